"""KV caches of transformers models for kvfuse, and what its codecs do to those models (docs/bridge.md)."""

//! Chunks fast-fusion: similar blocks of one prompt's chunks fuse while the prompt is prefilled.

use super::{Blocks, Fusion};
use crate::codec::{CacheBatch, Codec, Coverage, Memo};
use crate::error::{Error, Result};
use crate::interrupt;
use crate::model::{Decoder, Segment};

/// The paper's CFF (docs/fusion.md): whenever `fuse_chunks` further chunks are complete, these are fused, a leaf a chunk;
/// chunks after them, and the answer, attend to the fused cache.
#[derive(Debug, Clone)]
pub struct ChunkFusion {
    fusion: Fusion,
    chunk_tokens: usize,
    fuse_chunks: usize,
}

impl ChunkFusion {
    /// # Errors
    /// If there are no tokens in a chunk, or not two chunks to fuse.
    pub fn new(fusion: Fusion, chunk_tokens: usize, fuse_chunks: usize) -> Result<Self> {
        if chunk_tokens == 0 {
            return Err(Error::argument("chunk: a chunk has at least one block"));
        }
        if fuse_chunks < 2 {
            return Err(Error::argument(format!("fuse={fuse_chunks}: fusing takes at least 2 chunks")));
        }
        Ok(ChunkFusion { fusion, chunk_tokens, fuse_chunks })
    }

    /// # Errors
    /// If a chunk is not whole blocks of this size.
    pub fn check(&self, block_size: usize) -> Result<()> {
        if self.chunk_tokens.is_multiple_of(block_size) {
            return Ok(());
        }
        let message =
            format!("a chunk of {} tokens is no multiple of the block size {block_size}", self.chunk_tokens);
        Err(Error::argument(message))
    }

    pub fn chunk_tokens(&self) -> usize {
        self.chunk_tokens
    }

    pub fn fuse_chunks(&self) -> usize {
        self.fuse_chunks
    }

    /// Fewest tokens that a cache must have for anything to fuse.
    pub fn least_tokens(&self) -> usize {
        self.chunk_tokens * self.fuse_chunks
    }

    /// Fuses the chunks `first..first + fuse_chunks` of one request, whose cache must hold them unfused.
    pub fn fuse(&self, batch: &mut CacheBatch, request: usize, first: usize) -> Result<()> {
        let chunk = self.chunk_tokens / batch.pool.shape().block_size;
        let blocks =
            Blocks::of_chunks(batch, request, first * chunk..(first + self.fuse_chunks) * chunk, chunk);
        self.fusion.encode_blocks(batch, &blocks)
    }

    /// Prefills the batch's last request chunk by chunk into its (empty) cache, fusing on the way.
    pub fn prefill(&self, decoder: &Decoder, batch: &mut CacheBatch) -> Result<()> {
        let Some(request) = batch.caches.len().checked_sub(1) else { return Ok(()) };
        let tokens = batch.tokens[request].clone();
        for (n, chunk) in tokens.chunks(self.chunk_tokens).enumerate() {
            interrupt::check()?;
            let cache = &mut batch.caches[request];
            let number = format!("{request} of the batch");
            let fed = decoder.forward(&mut batch.pool, &mut [Segment { cache, tokens: chunk }], None);
            fed.map_err(|f| f.of(|_| &number))?;
            let complete = n + 1;
            if chunk.len() == self.chunk_tokens && complete.is_multiple_of(self.fuse_chunks) {
                self.fuse(batch, request, complete - self.fuse_chunks)?;
            }
        }
        Ok(())
    }
}

impl Codec for ChunkFusion {
    fn within_tenant(&self) -> Option<bool> {
        self.fusion.within_tenant()
    }

    fn chunks(&self) -> Option<&ChunkFusion> {
        Some(self)
    }

    /// What fusion touches; the leaves are the blocks of complete groups of chunks.
    fn coverage(&self, layers: usize) -> Coverage {
        Coverage { leaf_tokens: Some(self.least_tokens()), ..self.fusion.coverage(layers) }
    }

    fn encode(&self, _batch: &mut CacheBatch, _memo: &Memo) -> Result<()> {
        Err(Error::argument("cff prefills anew: finished caches cannot be encoded by it"))
    }
}

"""Makes tests/fixtures/nvfp4.json: numbers in NVFP4 by ml_dtypes' E2M1 and E4M3.

    pip install numpy ml_dtypes
    python tests/reference/make_nvfp4.py

Groups of sixteen share an E4M3 scale, a page of them an f16 one: the largest number of the page over 6 * 448. tests/methods.rs compares.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np

rng = np.random.default_rng(0)
pages = []
for spread in (0.001, 1.0, 30.0):
    # Groups of very different sizes, one of zeros, and ties between codes.
    page = (rng.standard_normal((2, 2, 16)) * spread).astype(np.float16).astype(np.float32)
    page *= np.array([[[1.0], [0.05]], [[0.0], [1.0]]], dtype=np.float32)
    page[0, 0, :8] = np.float32(spread) * np.array([6, 5, 3.5, 2.5, 1.75, 1.25, 0.75, -0.25], dtype=np.float32)
    most = np.abs(page).max()
    scale = np.float32(np.float16(most / np.float32(6 * 448)))
    groups = np.abs(page).max(axis=-1, keepdims=True) / np.float32(6) / scale
    # Beyond 448, which the scale's own rounding may bring about, ml_dtypes has NaN.
    steps = np.minimum(groups, np.float32(448)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    safe = np.where(steps > 0, steps, np.float32(1))
    codes = np.clip(page / safe, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    pages.append({"numbers": page.ravel().tolist(), "read": (codes * steps).ravel().tolist()})
out = Path(__file__).parent.parent / "fixtures" / "nvfp4.json"
out.write_text(json.dumps({"tokens": 2, "kv_heads": 2, "head_dim": 16, "pages": pages}) + "\n")

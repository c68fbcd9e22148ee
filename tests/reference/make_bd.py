"""Writes tests/fixtures/bd.json: Bjontegaard differences of made-up curves by the package `bjontegaard` 1.3, for tests/compare.rs.

    python3 -m venv v && v/bin/pip install bjontegaard==1.3 && v/bin/python tests/reference/make_bd.py
"""

import json
from pathlib import Path

import bjontegaard as bd

# Bits per element and -10 log10 KL, quality rising with rate.
CURVES = {
    "even": ([0.3, 0.6, 1.2, 2.4, 4.8], [8.0, 13.0, 18.5, 24.0, 31.0]),
    "shifted": ([0.25, 0.5, 1.0, 2.0, 4.0], [8.0, 13.0, 18.5, 24.0, 31.0]),
    "bent": ([0.2, 0.5, 0.9, 2.9], [5.0, 14.5, 16.0, 29.0]),
    "few": ([0.4, 2.2], [9.0, 22.0]),
    "three": ([0.35, 0.8, 3.9], [10.0, 15.0, 26.0]),
    "flat": ([0.3, 0.7, 1.5, 3.0], [12.0, 12.5, 20.0, 20.2]),
    "apart": ([5.0, 9.0, 12.0], [40.0, 45.0, 49.0]),
}

cases = []
for a, (rate_a, quality_a) in CURVES.items():
    for b, (rate_b, quality_b) in CURVES.items():
        for method in ["pchip", "akima"]:
            arguments = dict(method=method, require_matching_points=False, min_overlap=0)
            rate = bd.bd_rate(rate_a, quality_a, rate_b, quality_b, **arguments)
            quality = bd.bd_psnr(rate_a, quality_a, rate_b, quality_b, **arguments)
            number = lambda x: None if x != x else float(x)
            cases.append({"anchor": a, "test": b, "method": method, "rate": number(rate), "quality": number(quality)})
out = {"curves": {name: {"rate": r, "quality": q} for name, (r, q) in CURVES.items()}, "cases": cases}
path = Path(__file__).parent.parent / "fixtures" / "bd.json"
path.write_text(json.dumps(out, indent=1) + "\n")
print(path, len(cases))

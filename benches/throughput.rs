use kvfuse::model::gemm::*;
use std::time::Instant;
fn best(mut f: impl FnMut()) -> f64 {
    let mut b = f64::MAX;
    for _ in 0..8 {
        let t = Instant::now();
        f();
        b = b.min(t.elapsed().as_secs_f64());
    }
    b
}
fn main() {
    for threads in [1, 2] {
        let p = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        p.install(|| {
            let n = 1536;
            let a = vec![0.5f32; n * n];
            let b = vec![0.25f32; n * n];
            let l = Linear::from_rows(&[&b], n);
            let mut o = vec![0.; n * n];
            if threads == 1 {
                let t = best(|| product(View::row_major(&a, n, n), View::row_major(&b, n, n), &mut o));
                println!("gemm1 {:.1}", 2e-9 * (n * n * n) as f64 / t);
                let t = best(|| {
                    product(View::row_major(&a, n, n), View::row_major(&b, n, n).transposed(), &mut o)
                });
                println!("gemm1 bT {:.1}", 2e-9 * (n * n * n) as f64 / t);
            }
            let t = best(|| {
                l.apply(&a);
            });
            println!("thr {threads} linear {n}: {:.1} GF", 2e-9 * (n * n * n) as f64 / t);
            for (inp, out) in [(576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49152)] {
                let w = vec![0.1f32; inp * out];
                // 8 copies to spill cache
                let ls: Vec<_> =
                    (0..if out > 40000 { 1 } else { 16 }).map(|_| Linear::from_rows(&[&w], inp)).collect();
                for rows in [1, 4, 8, 16, 32, 64, 200, 512] {
                    if out > 40000 && rows > 64 {
                        continue;
                    }
                    let x = vec![0.3f32; rows * inp];
                    let t = best(|| {
                        for l in &ls {
                            std::hint::black_box(l.apply(&x));
                        }
                    }) / ls.len() as f64;
                    println!(
                        "thr {threads} {inp}x{out} rows {rows}: {:.1} GF  {:.1} GB/s",
                        2e-9 * (rows * inp * out) as f64 / t,
                        4e-9 * (inp * out) as f64 / t
                    );
                }
            }
        });
    }
}

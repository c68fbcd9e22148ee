//! Rotary position embedding, rotate-half layout: number i of a head is paired with number i + d/2.

use super::config::{ModelConfig, RopeConfig};

/// The position embeddings of all layers of a model; sliding layers may have their own.
pub struct Ropes {
    tables: Vec<Rope>,
    /// Layer -> table; layers beyond the last have the first.
    of_layer: Vec<usize>,
}

impl Ropes {
    /// For positions `0..positions`.
    pub fn new(config: &ModelConfig, positions: usize) -> Self {
        let mut kinds: Vec<&RopeConfig> = vec![&config.rope];
        let mut kind = |rope| {
            let known = kinds.iter().position(|k| *k == rope);
            known.unwrap_or_else(|| {
                kinds.push(rope);
                kinds.len() - 1
            })
        };
        let of_layer = (0..config.layers).map(|n| kind(config.layer_rope(n))).collect();
        Ropes { tables: kinds.into_iter().map(|k| Rope::new(k, positions)).collect(), of_layer }
    }

    /// One for all layers.
    pub fn same(rope: Rope) -> Self {
        Ropes { tables: vec![rope], of_layer: Vec::new() }
    }

    pub fn layer(&self, n: usize) -> &Rope {
        &self.tables[self.of_layer.get(n).copied().unwrap_or(0)]
    }

    /// Positions the tables reach to.
    pub fn positions(&self) -> usize {
        self.tables[0].positions()
    }
}

/// Cosines and sines for positions `0..positions`.
pub struct Rope {
    half: usize,
    /// `[positions, half]` each.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rope {
    pub fn new(config: &RopeConfig, positions: usize) -> Self {
        let half = config.dims / 2;
        let mut frequencies = config.frequencies();
        for (frequency, divisor) in frequencies.iter_mut().zip(&config.divisors) {
            *frequency /= divisor;
        }
        let angles = (0..positions).flat_map(|p| frequencies.iter().map(move |f| p as f64 * f));
        let (cos, sin) = angles.map(|a| (a.cos() as f32, a.sin() as f32)).unzip();
        Rope { half, cos, sin }
    }

    /// Positions the tables reach to.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.half
    }

    /// Rotates one head (`[2 * half]`) to `position`, in place.
    pub fn rotate(&self, head: &mut [f32], position: usize) {
        self.turn(head, position, 1.0);
    }

    /// Takes [`Rope::rotate`] off again.
    pub fn strip(&self, head: &mut [f32], position: usize) {
        self.turn(head, position, -1.0);
    }

    /// [`Rope::strip`] for consecutive tokens from `position` on: `keys` is `[tokens, width]`, whole heads side by side.
    pub fn strip_tokens(&self, keys: &mut [f32], width: usize, position: usize) {
        for (token, row) in keys.chunks_exact_mut(width).enumerate() {
            for head in row.chunks_exact_mut(2 * self.half) {
                self.strip(head, position + token);
            }
        }
    }

    /// [`Rope::rotate`] for consecutive tokens, as [`Rope::strip_tokens`].
    pub fn rotate_tokens(&self, keys: &mut [f32], width: usize, position: usize) {
        for (token, row) in keys.chunks_exact_mut(width).enumerate() {
            for head in row.chunks_exact_mut(2 * self.half) {
                self.rotate(head, position + token);
            }
        }
    }

    fn turn(&self, head: &mut [f32], position: usize, sign: f32) {
        let row = position * self.half..(position + 1) * self.half;
        let (left, right) = head.split_at_mut(self.half);
        for (((l, r), c), s) in left.iter_mut().zip(right).zip(&self.cos[row.clone()]).zip(&self.sin[row]) {
            let s = sign * s;
            (*l, *r) = (*l * c - *r * s, *r * c + *l * s);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Stripping and rotating again is the identity to 1e-5, at any position of the model's context.
        #[test]
        fn strip_then_rotate_is_the_identity(
            position in 0usize..8192, keys in prop::collection::vec(-4.0f32..4.0, 2 * 2 * 64)
        ) {
            let rope = Rope::new(&RopeConfig::plain(100_000.0, 64), 8194);
            let mut turned = keys.clone();
            rope.strip_tokens(&mut turned, 128, position);
            rope.rotate_tokens(&mut turned, 128, position);
            for (a, b) in keys.iter().zip(&turned) {
                prop_assert!((a - b).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn scores_depend_on_the_distance_only() {
        let rope = Rope::new(&RopeConfig::plain(100.0, 4), 64);
        let score = |p: usize, q: usize| {
            let (mut a, mut b) = ([0.3f32, -1.0, 0.7, 0.2], [1.0f32, 0.5, -0.25, 2.0]);
            rope.rotate(&mut a, p);
            rope.rotate(&mut b, q);
            a.iter().zip(&b).map(|(x, y)| x * y).sum::<f32>()
        };
        assert!((score(3, 10) - score(40, 47)).abs() < 1e-4);
        assert!((score(3, 10) - score(3, 11)).abs() > 1e-3);
    }
}

//! Rotary position embedding, rotate-half layout: number i of a head is paired with number i + d/2.

use super::config::RopeConfig;

/// Cosines and sines for positions `0..positions`.
pub struct Rope {
    half: usize,
    /// `[positions, half]` each.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Rope {
    pub fn new(config: RopeConfig, positions: usize) -> Self {
        let half = config.dims / 2;
        let frequencies: Vec<f64> =
            (0..half).map(|i| config.base.powf(-2.0 * i as f64 / config.dims as f64)).collect();
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
        let row = position * self.half..(position + 1) * self.half;
        let (left, right) = head.split_at_mut(self.half);
        for (((l, r), c), s) in left.iter_mut().zip(right).zip(&self.cos[row.clone()]).zip(&self.sin[row]) {
            (*l, *r) = (*l * c - *r * s, *r * c + *l * s);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_depend_on_the_distance_only() {
        let rope = Rope::new(RopeConfig { base: 100.0, dims: 4 }, 64);
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

//! Smooth curves through points: piecewise cubics with the slopes of Fritsch and Butland 1984 (PCHIP) or of Akima 1970.

/// How slopes are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Slopes {
    /// Monotone where the points are.
    Pchip,
    /// From the slopes of five points.
    Akima,
}

/// A piecewise cubic: through each point with its slope.
#[derive(Debug, Clone)]
pub struct Cubic {
    x: Vec<f64>,
    y: Vec<f64>,
    slope: Vec<f64>,
}

impl Cubic {
    /// Through points whose `x` rise; `None` for fewer than two, or where they do not.
    pub fn through(x: &[f64], y: &[f64], slopes: Slopes) -> Option<Self> {
        let rises = x.windows(2).all(|w| w[0] < w[1]) && x.iter().chain(y).all(|v| v.is_finite());
        if x.len() < 2 || x.len() != y.len() || !rises {
            return None;
        }
        let slope = match slopes {
            Slopes::Pchip => pchip(x, y),
            Slopes::Akima => akima(x, y),
        };
        Some(Cubic { x: x.to_vec(), y: y.to_vec(), slope })
    }

    pub fn range(&self) -> (f64, f64) {
        (self.x[0], self.x[self.x.len() - 1])
    }

    /// The integral from `a` to `b`, both within the range.
    pub fn integral(&self, a: f64, b: f64) -> f64 {
        (0..self.x.len() - 1)
            .map(|i| {
                let (from, to) = (self.x[i].max(a), self.x[i + 1].min(b));
                if from < to { self.antiderivative(i, to) - self.antiderivative(i, from) } else { 0.0 }
            })
            .sum()
    }

    /// Of one piece, zero at its left end.
    fn antiderivative(&self, i: usize, at: f64) -> f64 {
        let h = self.x[i + 1] - self.x[i];
        let t = (at - self.x[i]) / h;
        let (y, m) = ((self.y[i], self.y[i + 1]), (self.slope[i] * h, self.slope[i + 1] * h));
        // Integrals of the Hermite basis.
        let (t2, t3, t4) = (t * t, t * t * t, t * t * t * t);
        h * (y.0 * (t4 / 2.0 - t3 + t)
            + m.0 * (t4 / 4.0 - 2.0 * t3 / 3.0 + t2 / 2.0)
            + y.1 * (t3 - t4 / 2.0)
            + m.1 * (t4 / 4.0 - t3 / 3.0))
    }
}

/// Widths and rises of the pieces.
fn pieces(x: &[f64], y: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let h: Vec<f64> = x.windows(2).map(|w| w[1] - w[0]).collect();
    let m = y.windows(2).zip(&h).map(|(w, h)| (w[1] - w[0]) / h).collect();
    (h, m)
}

/// Weighted harmonic means of the slopes on both sides, zero where these differ in sign; one-sided three-point slopes at the ends.
fn pchip(x: &[f64], y: &[f64]) -> Vec<f64> {
    let (h, m) = pieces(x, y);
    if h.len() == 1 {
        return vec![m[0]; 2];
    }
    let inner = |i: usize| {
        if m[i - 1] * m[i] <= 0.0 {
            return 0.0;
        }
        let (a, b) = (2.0 * h[i] + h[i - 1], h[i] + 2.0 * h[i - 1]);
        (a + b) / (a / m[i - 1] + b / m[i])
    };
    let end = |h0: f64, h1: f64, m0: f64, m1: f64| {
        let slope = ((2.0 * h0 + h1) * m0 - h0 * m1) / (h0 + h1);
        if slope * m0 <= 0.0 {
            0.0
        } else if m0 * m1 <= 0.0 && slope.abs() > 3.0 * m0.abs() {
            3.0 * m0
        } else {
            slope
        }
    };
    let n = h.len();
    let first = end(h[0], h[1], m[0], m[1]);
    let last = end(h[n - 1], h[n - 2], m[n - 1], m[n - 2]);
    std::iter::once(first).chain((1..n).map(inner)).chain([last]).collect()
}

/// Means of the slopes on both sides, each weighed by how little it changes on the other side; slopes beyond the ends go on in a line.
fn akima(x: &[f64], y: &[f64]) -> Vec<f64> {
    let (_, inner) = pieces(x, y);
    let n = inner.len();
    if n == 1 {
        return vec![inner[0]; 2];
    }
    let mut m = vec![0.0; n + 4];
    m[2..n + 2].copy_from_slice(&inner);
    m[1] = 2.0 * m[2] - m[3];
    m[0] = 2.0 * m[1] - m[2];
    m[n + 2] = 2.0 * m[n + 1] - m[n];
    m[n + 3] = 2.0 * m[n + 2] - m[n + 1];
    let change: Vec<f64> = m.windows(2).map(|w| (w[1] - w[0]).abs()).collect();
    let weights = |i: usize| (change[i + 2], change[i]);
    let most = (0..=n).map(|i| weights(i).0 + weights(i).1).fold(0.0, f64::max);
    (0..=n)
        .map(|i| {
            let (a, b) = weights(i);
            if a + b > 1e-9 * most {
                (a * m[i + 1] + b * m[i + 2]) / (a + b)
            } else {
                0.5 * (m[i] + m[i + 3])
            }
        })
        .collect()
}

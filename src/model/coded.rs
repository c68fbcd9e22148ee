//! Weights as whole codes in groups along a row, each group with a scale and, in some types, an offset: what GGUF files store.

use super::numbers::rows;

/// Rows of codes: number = code * scale + offset, rounded twice as ggml does it.
pub struct Coded {
    /// Row after row.
    pub codes: Vec<i8>,
    /// Of each group.
    pub scales: Vec<f32>,
    /// Of each group; empty if they are all zero.
    pub offsets: Vec<f32>,
    /// Numbers that share a scale.
    pub group: usize,
    /// The least code there can be, if sixteen codes are all there are.
    pub nibbles_from: Option<i8>,
}

impl Coded {
    pub fn len(&self) -> usize {
        self.codes.len()
    }

    /// A group's offset.
    pub fn offset(&self, group: usize) -> f32 {
        self.offsets.get(group).copied().unwrap_or(0.0)
    }

    /// One number.
    pub fn get(&self, i: usize) -> f32 {
        f32::from(self.codes[i]) * self.scales[i / self.group] + self.offset(i / self.group)
    }

    pub fn to_f32(&self) -> Vec<f32> {
        (0..self.len()).map(|i| self.get(i)).collect()
    }

    /// Its rows of `width` numbers in another order.
    pub fn with_rows(&self, width: usize, order: &[usize]) -> Self {
        let groups = width / self.group;
        Coded {
            codes: rows(&self.codes, width, order),
            scales: rows(&self.scales, groups, order),
            offsets: if self.offsets.is_empty() { Vec::new() } else { rows(&self.offsets, groups, order) },
            ..*self
        }
    }
}

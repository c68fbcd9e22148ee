//! Where a text can stand beside a point without covering what is there.

/// Pixels, edges included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Box {
    pub left: i32,
    pub top: i32,
    pub right: i32,
    pub bottom: i32,
}

impl Box {
    /// A square around a point.
    pub fn around((x, y): (i32, i32), reach: i32) -> Self {
        Box { left: x - reach, top: y - reach, right: x + reach, bottom: y + reach }
    }

    /// The pixel of it that is nearest to another.
    pub fn nearest(&self, (x, y): (i32, i32)) -> (i32, i32) {
        (x.clamp(self.left, self.right), y.clamp(self.top, self.bottom))
    }

    fn meets(&self, other: &Box) -> bool {
        self.left <= other.right
            && other.left <= self.right
            && self.top <= other.bottom
            && other.top <= self.bottom
    }

    fn within(&self, frame: &Box) -> bool {
        self.left >= frame.left
            && self.right <= frame.right
            && self.top >= frame.top
            && self.bottom <= frame.bottom
    }
}

/// A place near a point for a text of this size, within the frame: the nearest of some that meets nothing; if there is none, and the
/// text is `needed`, the one that meets least.
pub fn place(
    (x, y): (i32, i32),
    (wide, high): (i32, i32),
    frame: &Box,
    taken: &[Box],
    needed: bool,
) -> Option<Box> {
    let mut best: Option<(usize, Box)> = None;
    let rings = if needed { 12 } else { 2 };
    for ring in 0..rings {
        let down = ring * (high + 2) / 2;
        for (left, top) in [
            (x + 8, y - high / 2 - down),
            (x + 8, y - high / 2 + down),
            (x - wide / 2, y - high - 7 - down),
            (x - wide / 2, y + 7 + down),
            (x - wide - 8, y - high / 2 - down),
            (x - wide - 8, y - high / 2 + down),
        ] {
            let left = left.min(frame.right - wide).max(frame.left);
            let own = Box { left, top, right: left + wide, bottom: top + high };
            if !own.within(frame) {
                continue;
            }
            match taken.iter().filter(|b| own.meets(b)).count() {
                0 => return Some(own),
                n if best.is_none_or(|(least, _)| n < least) => best = Some((n, own)),
                _ => {}
            }
        }
    }
    best.filter(|_| needed).map(|(_, own)| own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_stand_beside_each_other() {
        let frame = Box { left: 0, top: 0, right: 200, bottom: 100 };
        let mut taken = Vec::new();
        // Points that lie on each other.
        for _ in 0..8 {
            let own = place((100, 50), (60, 12), &frame, &taken, true).unwrap();
            assert!(own.within(&frame) && taken.iter().all(|b| !own.meets(b)), "{own:?} {taken:?}");
            taken.push(own);
        }
        let full = [frame];
        assert_eq!(place((100, 50), (60, 12), &frame, &full, false), None);
        assert!(place((100, 50), (60, 12), &frame, &full, true).is_some());
    }
}

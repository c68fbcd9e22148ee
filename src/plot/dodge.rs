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

/// What is drawn already.
#[derive(Debug, Default)]
pub struct Taken {
    /// Texts and points.
    pub marks: Vec<Box>,
    /// Lines, in pieces of [`PIECE`] pixels.
    lines: Vec<Box>,
}

/// Pixels of a piece of a line.
const PIECE: i32 = 6;

impl Taken {
    /// Adds a line from one point to another.
    pub fn line(&mut self, from: (i32, i32), to: (i32, i32)) {
        let (dx, dy) = (to.0 - from.0, to.1 - from.1);
        let pieces = (dx.abs().max(dy.abs()) / PIECE).max(1);
        let at = |n: i32| (from.0 + dx * n / pieces, from.1 + dy * n / pieces);
        self.lines.extend((0..=pieces).map(|n| Box::around(at(n), 1)));
    }

    /// Texts and points that a box would cover, and pieces of lines.
    fn under(&self, own: &Box) -> (usize, usize) {
        let met = |boxes: &[Box]| boxes.iter().filter(|b| own.meets(b)).count();
        (met(&self.marks), met(&self.lines))
    }
}

/// A place near a point for a text of this size, within the frame: where it covers nothing and is near; rather on lines than on texts and
/// points, and on these only if the text is `needed`.
pub fn place(
    (x, y): (i32, i32),
    (wide, high): (i32, i32),
    frame: &Box,
    taken: &Taken,
    needed: bool,
) -> Option<Box> {
    // What is covered counts as so many rings further out.
    const MARK: usize = 200;
    const LINE: usize = 1;
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
            let (marks, lines) = taken.under(&own);
            if marks > 0 && !needed {
                continue;
            }
            let cost = MARK * marks + LINE * lines + ring as usize;
            if best.is_none_or(|(least, _)| cost < least) {
                best = Some((cost, own));
            }
        }
    }
    best.map(|(_, own)| own)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_stand_beside_each_other() {
        let frame = Box { left: 0, top: 0, right: 200, bottom: 100 };
        let mut taken = Taken::default();
        // Points that lie on each other.
        for _ in 0..8 {
            let own = place((100, 50), (60, 12), &frame, &taken, true).unwrap();
            assert!(own.within(&frame) && taken.marks.iter().all(|b| !own.meets(b)), "{own:?} {taken:?}");
            taken.marks.push(own);
        }
        let full = Taken { marks: vec![frame], ..Taken::default() };
        assert_eq!(place((100, 50), (60, 12), &frame, &full, false), None);
        assert!(place((100, 50), (60, 12), &frame, &full, true).is_some());
    }

    #[test]
    fn texts_stand_beside_lines() {
        let frame = Box { left: 0, top: 0, right: 200, bottom: 100 };
        let mut taken = Taken::default();
        taken.line((100, 50), (200, 50));
        let own = place((100, 50), (60, 12), &frame, &taken, true).unwrap();
        assert!(taken.under(&own) == (0, 0), "{own:?}");
    }
}

//! Memory of f16 blocks: slots of one size in large pieces of their own. What codecs and requests leave behind lies together there and can go
//! back to the system, whatever lies beside it; between other vectors it would be holes that only what fits uses again.

use crate::memory::discard;
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes that are asked of the allocator at once, or one slot if that is larger; and those of dropped blocks that are kept for the next ones
/// before the system gets them back.
const PIECE: usize = 4 << 20;
/// Pieces begin where the system's pages do.
const ALIGNMENT: usize = 4096;

/// Slots for blocks of so many keys and as many values.
#[derive(Debug)]
pub struct Slab {
    width: usize,
    slots: Mutex<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    pieces: Vec<NonNull<f16>>,
    /// Free slots, by number, whose memory the system has; the last is taken first.
    free: Vec<usize>,
    /// Free slots that still have theirs; they are taken before the others.
    kept: Vec<usize>,
}

// SAFETY: pieces are memory that nothing else knows of; slots are given out once at a time, under the lock.
unsafe impl Send for Slots {}

/// Keys and values of one block, up to `width` of each, in f16.
pub struct Halves {
    slab: Arc<Slab>,
    number: usize,
    /// `2 * width` numbers, of which `..len` and `width..width + len` were written.
    start: NonNull<f16>,
    len: usize,
}

// SAFETY: a slot is its owner's alone, as a vector's memory is.
unsafe impl Send for Halves {}
// SAFETY: as above; what is shared is only read.
unsafe impl Sync for Halves {}

impl Slab {
    /// For blocks of at most `width` keys, and as many values.
    pub fn new(width: usize) -> Arc<Self> {
        Arc::new(Slab { width: width.max(1), slots: Mutex::default() })
    }

    /// An empty block.
    pub fn take(self: &Arc<Self>) -> Halves {
        let mut slots = self.slots();
        let number = match slots.kept.pop().or_else(|| slots.free.pop()) {
            Some(number) => number,
            None => {
                let (first, more) = (slots.pieces.len() * self.slots_of_piece(), self.slots_of_piece());
                slots.pieces.push(self.piece());
                slots.free.extend((first + 1..first + more).rev());
                first
            }
        };
        let start = self.start(&slots, number);
        Halves { slab: Arc::clone(self), number, start, len: 0 }
    }

    /// Gives the memory of kept slots to the system, where whole pages of its lie in them.
    fn give_back(&self, slots: &mut Slots) {
        let mut kept = std::mem::take(&mut slots.kept);
        kept.sort_unstable_by(|a, b| b.cmp(a));
        let of_piece = self.slots_of_piece();
        for run in kept.chunk_by(|a, b| *a == b + 1 && a / of_piece == b / of_piece) {
            let Some(first) = run.last() else { continue };
            // SAFETY: nobody owns these slots, and what is taken counts as not written.
            unsafe { discard(self.start(slots, *first).as_ptr().cast(), run.len() * self.slot_bytes()) };
        }
        slots.free.append(&mut kept);
    }

    /// Bytes of a slot.
    pub fn slot_bytes(&self) -> usize {
        2 * self.width * size_of::<f16>()
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slots_of_piece(&self) -> usize {
        (PIECE / self.slot_bytes()).max(1)
    }

    fn layout(&self) -> Layout {
        let bytes = self.slots_of_piece() * self.slot_bytes();
        // No address space holds such a block.
        Layout::from_size_align(bytes, ALIGNMENT)
            .unwrap_or_else(|_| handle_alloc_error(Layout::new::<[f16; PIECE]>()))
    }

    fn piece(&self) -> NonNull<f16> {
        // SAFETY: the layout is of more than zero bytes.
        let piece = unsafe { alloc(self.layout()) };
        NonNull::new(piece.cast()).unwrap_or_else(|| handle_alloc_error(self.layout()))
    }

    fn start(&self, slots: &Slots, number: usize) -> NonNull<f16> {
        let (piece, at) = (number / self.slots_of_piece(), number % self.slots_of_piece());
        // SAFETY: a piece has so many slots.
        unsafe { slots.pieces[piece].add(at * 2 * self.width) }
    }
}

impl Drop for Slab {
    fn drop(&mut self) {
        let layout = self.layout();
        for piece in self.slots().pieces.drain(..) {
            // SAFETY: allocated with this layout; every slot holds on to its slab, so none is left.
            unsafe { dealloc(piece.as_ptr().cast(), layout) };
        }
    }
}

impl Halves {
    /// Numbers of keys, and as many of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes of memory, full or not.
    pub fn bytes(&self) -> usize {
        self.slab.slot_bytes()
    }

    /// Keys and values.
    pub fn parts(&self) -> [&[f16]; 2] {
        // SAFETY: both stretches lie in the slot and were written, in `extend` alone.
        [0, self.slab.width].map(|at| unsafe {
            std::slice::from_raw_parts(self.start.add(at).as_ptr().cast_const(), self.len)
        })
    }

    /// Adds keys, and as many values.
    ///
    /// # Panics
    /// If they are more than there is room for: a bug of the caller, never of input.
    pub fn push(&mut self, parts: [&[f32]; 2]) {
        // Slice conversions use the machine's own instructions; one `from_f32` a number is far slower.
        self.extend(parts, |out, part| out.convert_from_f32_slice(part));
    }

    fn extend<T>(&mut self, parts: [&[T]; 2], write: impl Fn(&mut [f16], &[T])) {
        let more = parts[0].len();
        assert!(parts[1].len() == more && self.len + more <= self.slab.width);
        for (part, at) in parts.into_iter().zip([0, self.slab.width]) {
            // SAFETY: there is room behind what was written, in a slot that is this one's alone; zeros are numbers.
            let out = unsafe {
                let start = self.start.add(at + self.len).as_ptr();
                start.write_bytes(0, more);
                std::slice::from_raw_parts_mut(start, more)
            };
            write(out, part);
        }
        self.len += more;
    }
}

impl Clone for Halves {
    fn clone(&self) -> Self {
        let mut copy = self.slab.take();
        copy.extend(self.parts(), <[f16]>::copy_from_slice);
        copy
    }
}

impl Drop for Halves {
    fn drop(&mut self) {
        let mut slots = self.slab.slots();
        slots.kept.push(self.number);
        if slots.kept.len() * self.slab.slot_bytes() >= PIECE {
            self.slab.give_back(&mut slots);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn numbers(from: usize, len: usize) -> Vec<f32> {
        (from..from + len).map(|x| x as f32).collect()
    }

    proptest! {
        /// Blocks taken, filled, copied, dropped and given back in any order hold what was put into them, and no two share memory.
        #[test]
        fn every_block_keeps_its_own_numbers(width in 1usize..3000, steps in prop::collection::vec((0u8..5, any::<usize>()), 1..200)) {
            let slab = Slab::new(width);
            let mut blocks: Vec<(Halves, Vec<f16>, Vec<f16>)> = Vec::new();
            for (what, which) in steps {
                let at = which % blocks.len().max(1);
                match (what, blocks.get_mut(at)) {
                    (0, _) | (_, None) => blocks.push((slab.take(), Vec::new(), Vec::new())),
                    (1, Some((halves, keys, values))) => {
                        let more = which % (width - keys.len() + 1);
                        let new = [numbers(which % 1000, more), numbers(which % 777, more)];
                        halves.push([&new[0], &new[1]]);
                        keys.extend(new[0].iter().map(|x| f16::from_f32(*x)));
                        values.extend(new[1].iter().map(|x| f16::from_f32(*x)));
                    }
                    (2, Some(block)) => {
                        let copy = block.clone();
                        blocks.push(copy);
                    }
                    (3, Some(_)) => {
                        blocks.swap_remove(at);
                    }
                    _ => slab.give_back(&mut slab.slots()),
                }
            }
            for (halves, keys, values) in &blocks {
                prop_assert_eq!(halves.parts(), [&keys[..], &values[..]]);
            }
            let live = blocks.len();
            drop(blocks);
            let slots = slab.slots();
            let free = slots.free.len() + slots.kept.len();
            prop_assert!(free >= live && free.is_multiple_of(slab.slots_of_piece()));
        }
    }
}

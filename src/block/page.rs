//! What a physical block holds: numbers in f32 or f16, or bytes that they are read from.

use super::halves;
use super::slab::{Halves, Slab};
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::borrow::Cow;
use std::sync::Arc;

/// Keys or values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    Key,
    Value,
}

impl Part {
    pub const BOTH: [Part; 2] = [Part::Key, Part::Value];
}

/// What a number keeps when it goes into the pool. Arithmetic on the cache is in f32 either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// All of it: for dumps and for parity with reference implementations.
    F32,
    /// 16 bits, which the ledger charges an element.
    F16,
}

impl Storage {
    /// What numbers become when they go into the pool.
    pub(super) fn round(self, numbers: &[f32]) -> Vec<f32> {
        match self {
            Storage::F32 => numbers.to_vec(),
            Storage::F16 => halves(numbers).to_f32_vec(),
        }
    }
}

/// Where a pool's numbers go.
#[derive(Debug, Clone)]
pub(super) enum Store {
    F32,
    F16(Arc<Slab>),
}

/// An encoded page: its bytes, and how many of their bits are codes of numbers and how many scales and the like.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Payload {
    pub bytes: Vec<u8>,
    pub code_bits: u64,
    pub side_bits: u64,
}

impl Payload {
    /// Without what a growing vector has to spare: pages are held for long, and count their bytes alone. Copied, since what is cut off in place
    /// would be a hole behind every page.
    fn trimmed(self) -> Self {
        Payload { bytes: self.bytes.as_slice().to_vec(), ..self }
    }
}

/// Reads the numbers of a page from its bytes.
pub trait ReadPage: Send + Sync {
    /// Appends keys or values: of one head `[tokens, head_dim]`, or of all `[tokens, kv_heads, head_dim]`.
    fn read(&self, bytes: &[u8], part: Part, head: Option<usize>, out: &mut Vec<f32>);

    /// Appends keys of one head channel by channel (`[head_dim, tokens]`), if they lie so; false if they do not.
    fn read_by_channel(&self, _bytes: &[u8], _head: usize, _out: &mut Vec<f32>) -> bool {
        false
    }
}

/// Numbers of one block, `[tokens, kv_heads, head_dim]` of keys and of values.
#[derive(Clone)]
enum Numbers {
    F32([Vec<f32>; 2]),
    F16(Halves),
    /// None: they are read from the payload, so many of keys and as many of values.
    Packed(usize),
}

/// One block's numbers, and what they are read from if not 16 bits each.
#[derive(Clone)]
pub(super) struct Page {
    numbers: Numbers,
    payload: Option<Payload>,
    /// Present if the payload alone suffices.
    reader: Option<Arc<dyn ReadPage>>,
}

impl Default for Page {
    fn default() -> Self {
        Page { numbers: Numbers::Packed(0), payload: None, reader: None }
    }
}

impl std::fmt::Debug for Page {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Page({} numbers, {} bytes)", self.len(), self.bytes())
    }
}

impl Page {
    pub fn new(store: &Store, keys: &[f32], values: &[f32]) -> Self {
        let numbers = match store {
            Store::F32 => Numbers::F32([keys.to_vec(), values.to_vec()]),
            Store::F16(slab) => {
                let mut own = slab.take();
                own.push([keys, values]);
                Numbers::F16(own)
            }
        };
        Page { numbers, payload: None, reader: None }
    }

    /// What a codec makes of a page: its bytes, and the numbers that are read from them.
    pub fn coded(
        keys: Vec<f32>,
        values: Vec<f32>,
        payload: Payload,
        reader: Option<Arc<dyn ReadPage>>,
    ) -> Self {
        let payload = payload.trimmed();
        Page { numbers: Numbers::F32([keys, values]), payload: Some(payload), reader }
    }

    /// Numbers of keys, and as many of values.
    pub fn len(&self) -> usize {
        match &self.numbers {
            Numbers::F32([keys, _]) => keys.len(),
            Numbers::F16(own) => own.len(),
            Numbers::Packed(len) => *len,
        }
    }

    /// Bytes of memory that numbers and payload take.
    pub fn bytes(&self) -> usize {
        let numbers = match &self.numbers {
            Numbers::F32(parts) => parts.iter().map(|p| p.capacity() * size_of::<f32>()).sum(),
            Numbers::F16(own) => own.bytes(),
            Numbers::Packed(_) => 0,
        };
        numbers + self.payload.as_ref().map_or(0, |p| p.bytes.len())
    }

    pub fn payload(&self) -> Option<&Payload> {
        self.payload.as_ref()
    }

    /// Puts another payload in place of the one it has.
    pub fn charge(&mut self, payload: Payload) {
        self.payload = Some(payload.trimmed());
    }

    /// Whether it holds numbers that can be read from the payload.
    pub fn is_packable(&self) -> bool {
        self.reader.is_some() && !matches!(self.numbers, Numbers::Packed(_))
    }

    /// Gives the memory of such numbers back.
    pub fn pack(&mut self) {
        self.numbers = Numbers::Packed(self.len());
    }

    /// Keys or values, `[tokens, kv_heads, head_dim]`.
    pub fn read(&self, part: Part) -> Cow<'_, [f32]> {
        match &self.numbers {
            Numbers::F32(parts) => Cow::Borrowed(&parts[part as usize]),
            Numbers::F16(own) => Cow::Owned(own.parts()[part as usize].to_f32_vec()),
            Numbers::Packed(len) => {
                let mut out = Vec::with_capacity(*len);
                self.unpack(part, None, &mut out);
                Cow::Owned(out)
            }
        }
    }

    fn unpack(&self, part: Part, head: Option<usize>, out: &mut Vec<f32>) {
        if let (Some(reader), Some(payload)) = (&self.reader, &self.payload) {
            reader.read(&payload.bytes, part, head, out);
        }
    }

    /// Appends one head of so many first tokens: `[tokens, head_dim]`.
    pub fn read_head(
        &self,
        part: Part,
        head: usize,
        (width, head_dim): (usize, usize),
        tokens: usize,
        out: &mut Vec<f32>,
    ) {
        let at = head * head_dim;
        let from = out.len();
        match &self.numbers {
            Numbers::F32(parts) => {
                for row in parts[part as usize].chunks_exact(width).take(tokens) {
                    out.extend_from_slice(&row[at..at + head_dim]);
                }
            }
            Numbers::F16(own) => {
                out.resize(from + tokens * head_dim, 0.0);
                halves::read_head(own.parts()[part as usize], width, at, head_dim, &mut out[from..]);
            }
            Numbers::Packed(_) => {
                self.unpack(part, Some(head), out);
                out.truncate(from + tokens * head_dim);
            }
        }
    }

    /// Appends keys of one head channel by channel (`[head_dim, tokens]`), where that is how they are stored.
    pub fn read_by_channel(&self, head: usize, out: &mut Vec<f32>) -> bool {
        match (&self.numbers, &self.reader, &self.payload) {
            (Numbers::Packed(_), Some(reader), Some(payload)) => {
                reader.read_by_channel(&payload.bytes, head, out)
            }
            _ => false,
        }
    }

    /// Whether two pages that are no payloads hold the same numbers.
    pub fn same(&self, other: &Page) -> bool {
        match (&self.numbers, &other.numbers) {
            (Numbers::F32(a), Numbers::F32(b)) => a == b,
            (Numbers::F16(a), Numbers::F16(b)) => a.parts() == b.parts(),
            _ => Part::BOTH.iter().all(|&part| self.read(part) == other.read(part)),
        }
    }

    /// The last few keys or values.
    pub fn last(&self, part: Part, count: usize) -> Vec<f32> {
        let from = self.len().saturating_sub(count);
        match &self.numbers {
            Numbers::F32(parts) => parts[part as usize][from..].to_vec(),
            Numbers::F16(own) => own.parts()[part as usize][from..].to_f32_vec(),
            Numbers::Packed(_) => self.read(part)[from..].to_vec(),
        }
    }

    /// Adds a token, with room for the rest of a block of `width` numbers.
    pub fn append(&mut self, storage: Storage, rows: [&[f32]; 2], width: usize) {
        // A page that grows is no longer what its bits say; numbers that were read from them stay as they are.
        if self.payload.is_some() {
            let [keys, values] = Part::BOTH.map(|part| self.read(part).into_owned());
            *self = Page { numbers: Numbers::F32([keys, values]), payload: None, reader: None };
        }
        match &mut self.numbers {
            Numbers::F32(parts) => {
                for (part, row) in parts.iter_mut().zip(rows) {
                    if part.capacity() < width {
                        part.reserve_exact(width - part.len());
                    }
                    part.extend(storage.round(row));
                }
            }
            Numbers::F16(own) => own.push(rows),
            Numbers::Packed(_) => {}
        }
    }
}

fn halves(numbers: &[f32]) -> Vec<f16> {
    // Slice conversions use the machine's own instructions; one `from_f32` a number is far slower.
    let mut halves = vec![f16::ZERO; numbers.len()];
    halves.convert_from_f32_slice(numbers);
    halves
}

//! Families of methods: what a chain does besides exact prefix sharing, and its colour where there are many curves.

use crate::codec::Role;
use crate::codec::registry::method;
use crate::codec::spec::names;
use plotters::style::RGBColor;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Fusion,
    Eviction,
    Codes,
    Trained,
    Several,
}

impl Family {
    pub const ALL: [Family; 5] =
        [Family::Fusion, Family::Eviction, Family::Codes, Family::Trained, Family::Several];

    /// Of a chain in normal form.
    pub fn of(chain: &str) -> Family {
        let stages = names(chain);
        let lossy: Vec<_> = stages.iter().filter_map(|name| method(name)).filter(|m| !m.lossless).collect();
        match lossy[..] {
            [one] => match one.role {
                _ if one.trained() => Family::Trained,
                Role::Fuse => Family::Fusion,
                Role::Evict => Family::Eviction,
                _ => Family::Codes,
            },
            _ => Family::Several,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Family::Fusion => "fusion, and blocks fused at random",
            Family::Eviction => "evictions",
            Family::Codes => "quantisers, transforms, entropy coding",
            Family::Trained => "trained codecs",
            Family::Several => "chains of two",
        }
    }

    /// Told apart by most colour-blind eyes (Okabe and Ito 2008).
    pub fn color(self) -> RGBColor {
        let (r, g, b) = match self {
            Family::Fusion => (213, 94, 0),
            Family::Eviction => (204, 121, 167),
            Family::Codes => (0, 114, 178),
            Family::Trained => (0, 130, 90),
            Family::Several => (120, 120, 120),
        };
        RGBColor(r, g, b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_of_the_family_of_what_it_loses_by() {
        let of = |chain: &str| Family::of(chain);
        assert_eq!(of("prefix+bff:tau=0.9"), Family::Fusion);
        assert_eq!(of("prefix+snapkv:keep=0.5"), Family::Eviction);
        assert_eq!(of("kivi:bits=4"), Family::Codes);
        assert_eq!(of("prefix+joint:codec=a.safetensors"), Family::Trained);
        assert_eq!(of("prefix+bff:tau=0.9+kivi:bits=4"), Family::Several);
    }
}

//! What a chain of methods means to a server: which pages are shared, which are fused, and how those that stay are kept.

use crate::block::BlockShape;
use crate::codec::evict::Needs;
use crate::codec::fusion::{Choices, Fusion, RopeMode};
use crate::codec::{Chain, Codec, Role};
use crate::error::{Error, Result};
use std::sync::Arc;

/// A chain, as a server follows it.
#[derive(Clone)]
pub struct Policy {
    /// The chain in normal form.
    pub name: String,
    /// Whether blocks are found again by their tokens (exact prefix caching).
    pub prefix: bool,
    /// Full blocks are replaced by similar ones that are there.
    pub fusion: Option<Fusion>,
    /// Full blocks are kept in fewer bits and read in place.
    pub code: Option<Arc<dyn Codec>>,
    /// Columns that nobody reads are kept encoded, and decoded when their tokens come again.
    pub tier: Option<Arc<dyn Codec>>,
}

impl std::fmt::Debug for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Policy({})", self.name)
    }
}

impl Policy {
    /// # Errors
    /// Stages that a server cannot follow, by name, with what it can.
    pub fn of(chain: &Chain, shape: BlockShape) -> Result<Self> {
        let mut policy = Policy { name: chain.name(), prefix: false, fusion: None, code: None, tier: None };
        for stage in chain.stages() {
            let refuse = |why: &str| {
                Err(Error::argument(format!("{}: a server cannot follow '{stage}': {why}", policy.name)))
            };
            match stage.role {
                Role::Nothing => {}
                Role::Share => policy.prefix = true,
                Role::Fuse => match stage.codec.fusion() {
                    Some(fusion) => match unserved(fusion.choices()) {
                        Some(why) => return refuse(why),
                        None => policy.fusion = Some(fusion.clone()),
                    },
                    None => return refuse("it fuses finished caches only; bff is served"),
                },
                Role::Evict => return refuse("evictions are measured by sweep, not served"),
                Role::Code if stage.codec.needs() != Needs::default() => {
                    return refuse("it needs attention weights; leave that option out");
                }
                Role::Code if stage.codec.reads_in_place(shape) && policy.tier.is_none() => {
                    if policy.code.replace(Arc::clone(&stage.codec)).is_some() {
                        return refuse("pages are kept by one codec");
                    }
                }
                Role::Code if policy.tier.is_some() => {
                    return refuse("what pages are kept by comes before what keeps cold ones");
                }
                Role::Code if !stage.codec.blocks_stand_alone() => {
                    return refuse(
                        "its blocks refer to others that may be gone; joint:...,reference=false is served",
                    );
                }
                Role::Code => policy.tier = Some(Arc::clone(&stage.codec)),
                Role::Whole => return refuse("its caches come from elsewhere"),
            }
        }
        if policy.tier.is_some() && (!policy.prefix || policy.fusion.is_some()) {
            return Err(Error::argument(format!(
                "{}: a codec that is not read in place keeps cold prefixes: write prefix+{}",
                policy.name,
                chain.stages().last().map_or(String::new(), ToString::to_string)
            )));
        }
        Ok(policy)
    }
}

/// Why a way of fusing cannot be followed block by block.
fn unserved(choices: &Choices) -> Option<&'static str> {
    if choices.rope == RopeMode::Strip {
        Some("blocks are fused as they are cached; leave rope=strip out")
    } else if choices.group_layers > 1 {
        Some("layers are fused one by one; leave group-layers out")
    } else {
        None
    }
}

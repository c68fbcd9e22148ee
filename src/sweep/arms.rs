//! The arms of a sweep: a chain of methods and how caches are packed for it.

use super::evaluate::FirstToken;
use crate::codec::Chain;
use crate::error::Result;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// How caches are cut and put together before anything is encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    /// Tokens a block.
    pub block_size: usize,
    /// Requests encoded and decoded together.
    pub batch: usize,
    /// Which cache the first answer token is computed from.
    pub first_token: FirstToken,
}

/// One line of a sweep.
#[derive(Clone)]
pub struct Arm {
    pub chain: Chain,
    pub packing: Packing,
}

impl Arm {
    /// The arm as columns of a table.
    pub fn columns(&self) -> ArmColumns {
        let Packing { block_size, batch, first_token } = self.packing;
        let (method, options) = (self.chain.name(), self.chain.options());
        ArmColumns { method, block_size, batch, first_token, options }
    }
}

/// An arm as columns of a table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ArmColumns {
    /// The chain in normal form.
    pub method: String,
    pub block_size: usize,
    pub batch: usize,
    pub first_token: FirstToken,
    /// `stage.option` -> value, defaults filled in.
    #[serde(flatten)]
    pub options: BTreeMap<String, Value>,
}

/// All arms of one packing, controls first: `none` and `prefix` always run, asked for or not; where chains share within
/// tenants only, so does a second `prefix`.
pub fn arms(chains: &[Chain], packing: Packing) -> Result<Vec<Arm>> {
    let mut all = Chain::controls(false)?;
    if chains.iter().any(Chain::within_tenant) {
        all.extend(Chain::controls(true)?);
    }
    all.extend(chains.iter().cloned());
    let mut arms: Vec<Arm> = Vec::new();
    for chain in all {
        // A calibration is for blocks of one size.
        let fits = chain.block_size().is_none_or(|size| size == packing.block_size);
        if fits && arms.iter().all(|a| a.chain.name() != chain.name()) {
            arms.push(Arm { chain, packing });
        }
    }
    Ok(arms)
}

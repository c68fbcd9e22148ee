//! The arms of a sweep: a method, its parameters, and the codec they name.

use crate::codec::fusion::BatchFusion;
use crate::codec::{Codec, Prefix, Unfused};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// A way of encoding a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// The caches as they are.
    None,
    /// Exact prefix sharing.
    Prefix,
    /// The paper's batch fast-fusion.
    Bff,
}

impl Method {
    pub fn name(self) -> &'static str {
        match self {
            Method::None => "none",
            Method::Prefix => "prefix",
            Method::Bff => "bff",
        }
    }
}

/// One line of a sweep.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Arm {
    pub method: Method,
    /// Threshold, where the method has one.
    pub tau: Option<f64>,
    /// Tokens a block.
    pub block_size: usize,
}

impl Arm {
    pub fn codec(&self) -> Result<Box<dyn Codec>> {
        match (self.method, self.tau) {
            (Method::None, _) => Ok(Box::new(Unfused)),
            (Method::Prefix, _) => Ok(Box::new(Prefix)),
            (Method::Bff, Some(tau)) => Ok(Box::new(BatchFusion::new(tau)?)),
            (Method::Bff, None) => Err(Error::argument("method bff needs --tau")),
        }
    }

    /// The arm in a few words, for progress and messages.
    pub fn label(&self) -> String {
        match self.tau {
            Some(tau) => format!("{} tau {tau} block {}", self.method.name(), self.block_size),
            None => format!("{} block {}", self.method.name(), self.block_size),
        }
    }
}

/// All arms of one block size. The controls `none` and `prefix` always come first, asked for or not.
pub fn arms(methods: &[Method], taus: &[f64], block_size: usize) -> Vec<Arm> {
    let control = |method| Arm { method, tau: None, block_size };
    let mut arms = vec![control(Method::None), control(Method::Prefix)];
    if methods.contains(&Method::Bff) {
        arms.extend(taus.iter().map(|&tau| Arm { method: Method::Bff, tau: Some(tau), block_size }));
    }
    arms
}

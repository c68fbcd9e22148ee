//! `kvfuse inspect`: check a dump from end to end and say what is in it.

use super::manifest::Manifest;
use super::shard::Shard;
use crate::error::{Error, Result};
use crate::interrupt;
use crate::progress::{Progress, Unit};
use rayon::prelude::*;
use serde::Serialize;
use std::path::Path;

/// A dump in numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    pub requests: usize,
    pub tokens: usize,
    pub longest: usize,
    pub shortest: usize,
    /// Root mean square of the keys and of the values of each layer.
    pub layer_rms: Vec<(f64, f64)>,
}

/// Reads every shard whole: shapes, token counts, and that every number is finite.
pub fn inspect(folder: &Path) -> Result<(Manifest, Summary)> {
    let manifest = Manifest::read(folder)?;
    let config = &manifest.model.config;
    let progress = Progress::new("checking", manifest.requests.len() as u64, Unit::Items("shards"));
    let mut squares = vec![(0.0, 0.0); config.layers];
    for i in 0..manifest.requests.len() {
        interrupt::check()?;
        let shard = open_request(folder, &manifest, i)?;
        let layers: Vec<(f64, f64)> = (0..config.layers)
            .into_par_iter()
            .map(|n| shard.layer(n).map(|(k, v)| (square_sum(&k), square_sum(&v))))
            .collect::<Result<_>>()?;
        for (sum, layer) in squares.iter_mut().zip(layers) {
            *sum = (sum.0 + layer.0, sum.1 + layer.1);
        }
        progress.increment();
    }
    progress.finish();
    let lengths = manifest.requests.iter().map(|r| r.tokens);
    let tokens: usize = lengths.clone().sum();
    let numbers = (tokens * config.kv_heads * config.head_dim) as f64;
    let summary = Summary {
        requests: manifest.requests.len(),
        tokens,
        longest: lengths.clone().max().unwrap_or(0),
        shortest: lengths.min().unwrap_or(0),
        layer_rms: squares.iter().map(|(k, v)| ((k / numbers).sqrt(), (v / numbers).sqrt())).collect(),
    };
    Ok((manifest, summary))
}

/// Opens one request's shard and holds it against the manifest.
pub(crate) fn open_request(folder: &Path, manifest: &Manifest, i: usize) -> Result<Shard> {
    let path = manifest.shard_path(folder, i);
    let shard = Shard::open(&path, &manifest.model.config)?;
    let (have, listed) = (shard.tokens().len(), manifest.requests[i].tokens);
    if have != listed {
        let problem =
            format!("holds {have} tokens, the manifest lists {listed}; delete the file and dump again");
        return Err(Error::file(path, problem));
    }
    if shard.sha256() != manifest.requests[i].sha256 {
        // A number that is none says more.
        (0..shard.layers()).try_for_each(|n| shard.layer(n).map(|_| ()))?;
        let problem = "is not the file that the manifest lists (its checksum differs): it was edited, or is of another dump; \
                       delete it and run the dump again";
        return Err(Error::file(path, problem));
    }
    Ok(shard)
}

fn square_sum(x: &[f32]) -> f64 {
    x.iter().map(|&x| f64::from(x) * f64::from(x)).sum()
}

//! The tokens of dumps as a corpus to train on: each physical block once, as exact prefix sharing leaves them.

use crate::codec::joint::corpus_of;
use crate::codec::joint::{corpus::Corpus, train::FOLDS};
use crate::codec::{Codec, Memo, Prefix};
use crate::dump::Manifest;
use crate::encoded::load_caches;
use crate::error::{Error, Result};
use crate::model::Model;
use std::path::{Path, PathBuf};

/// Tokens a block while training; codecs work with any size.
const BLOCK_SIZE: usize = 16;

/// All tokens of some dumps of one model.
pub fn corpus(dumps: &[PathBuf], manifests: &[Manifest], model: &Model) -> Result<Corpus> {
    let mut all: Option<Corpus> = None;
    for (dump, manifest) in dumps.iter().zip(manifests) {
        let own = of_dump(dump, manifest, model)?;
        match &mut all {
            None => all = Some(own),
            Some(all) => all.join(own),
        }
    }
    let enough = all.filter(|c| c.tokens() >= 4 * FOLDS);
    enough.ok_or_else(|| Error::file(&dumps[0], "holds too little text to train on"))
}

fn of_dump(dump: &Path, manifest: &Manifest, model: &Model) -> Result<Corpus> {
    let all: Vec<usize> = (0..manifest.requests.len()).collect();
    let (mut batch, _) = load_caches(dump, manifest, &all, BLOCK_SIZE, model.decoder.ropes(), 1)?;
    Prefix::default().encode(&mut batch, &Memo::default())?;
    // Texts that requests share go to one part; where all share some, requests are dealt out one by one.
    let groups = manifest.by_context();
    let mut folds: Vec<u8> = (0..manifest.requests.len()).map(|i| (i % FOLDS) as u8).collect();
    if groups.len() >= FOLDS {
        for (i, group) in groups.into_iter().enumerate() {
            group.into_iter().for_each(|request| folds[request] = (i % FOLDS) as u8);
        }
    }
    corpus_of(&batch, &folds)
}

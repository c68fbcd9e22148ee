//! A record of an arm from its lots, and lots that stay in memory for codecs that are found by trying.

use super::arms::{Arm, Packing};
use super::lot::{Lot, MOST_TARGETS, Piece, Source, targets};
use super::positions::positions;
use super::rows::{LayerScore, Measured, RequestScore, Row, Setting};
use super::runs::RunRecord;
use super::settings::SweepOptions;
use crate::codec::{CacheBatch, Codec, Distortion, Ledger};
use crate::dump::Manifest;
use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::kernels::instructions;
use crate::task::Metric;

/// All lots of a dump in memory: for calibrations and searches, which try codec after codec.
pub struct Stage<'a> {
    lots: Vec<Lot<'a>>,
    /// The arm that was measured first.
    baseline: Option<Vec<RequestScore>>,
}

impl<'a> Stage<'a> {
    /// `requests`: indices in the dump.
    pub fn new(source: Source<'a>, requests: &[usize], packing: Packing) -> Result<Self> {
        check_room(source.model, source.options, source.manifest, requests)?;
        let lots = requests.chunks(packing.batch).map(|lot| Lot::new(source, lot, packing, None));
        Ok(Stage { lots: lots.collect::<Result<_>>()?, baseline: None })
    }

    /// Encodes, compares and answers all requests by one arm, which is compared with the first that was run.
    pub fn run(&mut self, run: &str, setting: &Setting, arm: &Arm) -> Result<RunRecord> {
        let mut plain = self.baseline.as_deref();
        let mut pieces = Vec::new();
        for lot in &self.lots {
            let (own, rest) = plain.map(|scores| scores.split_at(lot.len())).unzip();
            pieces.push(lot.measure(run, &arm.chain, own)?);
            plain = rest;
        }
        let record = record(setting, arm, pieces, self.baseline.as_deref());
        self.baseline.get_or_insert_with(|| record.requests.clone());
        Ok(record)
    }

    /// Rate and KL (nats a token, mean over requests) of a codec, without answers.
    pub fn rate_and_kl(&self, codec: &dyn Codec) -> Result<(Ledger, f64)> {
        let mut ledger = Ledger::default();
        let mut kl = Vec::new();
        for lot in &self.lots {
            let (rate, own) = lot.rate_and_kl(codec)?;
            ledger += &rate;
            kl.extend(own);
        }
        Ok((ledger, crate::stats::mean(&kl)))
    }

    /// Rate of a codec, and its distortion of the layers it touches.
    pub fn rate_and_distortion(&self, codec: &dyn Codec) -> Result<(Ledger, Distortion)> {
        let mut ledger = Ledger::default();
        let mut error = Distortion::default();
        for lot in &self.lots {
            let (rate, own) = lot.rate_and_distortion(codec)?;
            ledger += &rate;
            error += own;
        }
        Ok((ledger, error))
    }

    /// The unfused caches of all requests, lot by lot.
    pub fn batches(&self) -> impl Iterator<Item = &CacheBatch> {
        self.lots.iter().map(Lot::batch)
    }
}

/// What an arm did to all lots, in their order. `baseline`: the no-fusion arm's scores, if this is not it.
///
/// # Panics
/// If there are no pieces: a bug of the caller, never of input.
pub(super) fn record(
    setting: &Setting,
    arm: &Arm,
    pieces: Vec<Piece>,
    baseline: Option<&[RequestScore]>,
) -> RunRecord {
    let whole = pieces.into_iter().reduce(|mut all, next| {
        all.join(next);
        all
    });
    let Some(Piece { run, ledger, prefix, errors, attention, requests, timings }) = whole else {
        unreachable!("a dump has a request")
    };
    let mut distortion = Distortion::default();
    errors.iter().for_each(|error| distortion += *error);
    let layers = ledger.layers.iter().zip(&errors).map(|(rate, error)| LayerScore::new(rate, error));
    let measured = Measured {
        ledger: &ledger,
        distortion,
        attention,
        scores: &requests,
        baseline: baseline.unwrap_or(&requests),
        cr_prefix: prefix[usize::from(arm.chain.within_tenant())].cr_audited(),
    };
    let row = Row::new(&run, setting, arm, &measured);
    let positions = positions(&requests, setting);
    RunRecord {
        row,
        kernels: instructions().to_owned(),
        layers: layers.collect(),
        positions,
        requests,
        timings,
    }
}

/// Whether the model's context holds every prompt with its answer.
pub(super) fn check_room(
    model: &Model,
    options: &SweepOptions,
    manifest: &Manifest,
    requests: &[usize],
) -> Result<()> {
    let room = model.decoder.context();
    for &i in requests {
        let tokens = manifest.requests[i].tokens;
        let (answer, of) = match manifest.requests[i].request.metric {
            Metric::Likelihood => (targets(model, manifest, i, &[])?.0.len(), "a continuation of"),
            _ => (options.answer_limit(manifest, i).max(MOST_TARGETS), "an answer (--max-new-tokens) of"),
        };
        if tokens + answer > room {
            let message = format!(
                "request {} has {tokens} tokens: with {of} {answer} it exceeds the model's context of {room}",
                manifest.requests[i].request.id,
            );
            return Err(Error::argument(message));
        }
    }
    Ok(())
}

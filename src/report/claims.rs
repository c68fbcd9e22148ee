//! What the paper and its reviewers say, held against the tables of one folder.

use crate::codec::registry::method;
use crate::codec::spec::names;
use crate::codec::{Method, Random, Role};
use crate::error::Result;
use crate::tables::{SWEEP_CSV, Table};
use crate::theory::SUMMARY_CSV;
use polars::prelude::{col, lit};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// "Negligible loss": mean KL from no fusion that counts as none, nats a token.
const NEGLIGIBLE_KL: f64 = 0.02;
/// The paper's headline ratio (arXiv 2601.03067, abstract).
const HEADLINE_CR: f64 = 4.38;
/// How far the share of blocks that a model says fusion removes may be from what it removes.
const REMOVED: f64 = 0.05;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Holds,
    Fails,
    /// The interval reaches both sides of the margin, or there is nothing to judge by.
    Undecided,
}

/// Loss of the task's score that counts as none: one point.
const MARGIN: f64 = 0.01;

/// Whether a quantity that should stay below `most` does, by its 95 % interval. An interval wholly below it passes the two
/// one-sided tests at 2.5 %; one wholly above it fails.
fn below(low: f64, high: f64, most: f64) -> Verdict {
    match (high <= most, low > most) {
        (true, _) => Verdict::Holds,
        (_, true) => Verdict::Fails,
        _ => Verdict::Undecided,
    }
}

/// A claim and what the tables say of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Claim {
    pub claim: String,
    pub verdict: Verdict,
    /// The numbers it rests on.
    pub reason: String,
}

/// Claims that a folder's tables can settle.
pub fn claims(folder: &Path) -> Result<Vec<Claim>> {
    let mut found = Vec::new();
    let sweep = folder.join(SWEEP_CSV);
    if sweep.exists() {
        found.extend(of_sweep(&Table::read(&sweep)?)?);
    }
    let summary = folder.join(SUMMARY_CSV);
    if summary.exists() {
        found.extend(of_predictions(&Table::read(&summary)?)?);
    }
    Ok(found)
}

/// Whether a chain is the paper's: fusion of similar blocks, with nothing that codes or drops what is left.
fn is_fusion(chain: &str) -> bool {
    let roles: Vec<Role> = names(chain).iter().filter_map(|n| method(n)).map(|m| m.role).collect();
    roles.contains(&Role::Fuse)
        && roles.iter().all(|r| *r <= Role::Fuse)
        && !names(chain).contains(&Random::NAME)
}

/// One fusing arm of a sweep.
#[derive(Deserialize)]
struct Arm {
    cr_audited: f64,
    cr_paper: f64,
    cr_beyond_prefix: f64,
    kl: f64,
    kl_low: f64,
    kl_high: f64,
    score_diff: f64,
    score_diff_low: f64,
    score_diff_high: f64,
    key_error: f64,
    value_error: f64,
}

fn of_sweep(table: &Table) -> Result<Vec<Claim>> {
    let fuses: Vec<bool> = table.strings("method")?.iter().map(|m| is_fusion(m)).collect();
    let arms: Vec<Arm> = table.with("fuses", fuses)?.query(|arms| arms.filter(col("fuses")))?.rows()?;
    if arms.is_empty() {
        return Ok(Vec::new());
    }
    let metric = table.strings("metric")?[0].clone();
    let requests = table.floats("requests")?[0];
    let most = |f: fn(&Arm) -> f64, of: &[&Arm]| of.iter().map(|a| f(a)).fold(f64::NAN, f64::max);
    let verdict = |holds: bool| if holds { Verdict::Holds } else { Verdict::Fails };
    // An arm is harmless if its KL and its loss of score are; it is harmful if either is above its margin.
    let loss = |a: &Arm| match a.score_diff_low.is_finite() {
        true => below(-a.score_diff_high, -a.score_diff_low, MARGIN),
        false => Verdict::Undecided,
    };
    let harm = |a: &Arm| match (below(a.kl_low, a.kl_high, NEGLIGIBLE_KL), loss(a)) {
        (Verdict::Holds, Verdict::Holds) => Verdict::Holds,
        (Verdict::Fails, _) | (_, Verdict::Fails) => Verdict::Fails,
        _ => Verdict::Undecided,
    };
    let margins = format!(
        "margins: KL {NEGLIGIBLE_KL} nats per token, {metric} {MARGIN}; 95 % intervals of {requests} requests, two one-sided tests"
    );
    // The claim holds if some arm that reaches the ratio is harmless, and fails if none reaches it or all that do are harmful.
    let reached =
        |ratio: fn(&Arm) -> f64, least: f64| -> (Verdict, String) {
            let there: Vec<&Arm> = arms.iter().filter(|a| ratio(a) >= least).collect();
            let of = |wanted: Verdict| there.iter().filter(|a| harm(a) == wanted).count();
            let (harmless, undecided) = (of(Verdict::Holds), of(Verdict::Undecided));
            let judged = match (harmless, undecided) {
                (1.., _) => Verdict::Holds,
                (0, 1..) => Verdict::Undecided,
                _ => Verdict::Fails,
            };
            let mildest = there.iter().min_by(|a, b| a.kl.total_cmp(&b.kl));
            let mildest = mildest.map_or("none reaches it".to_owned(), |a| {
            format!(
                "the mildest has KL {:.4} [{:.4}, {:.4}] and {metric} {:+.3} [{:+.3}, {:+.3}] at ratio {:.2}",
                a.kl, a.kl_low, a.kl_high, a.score_diff, a.score_diff_low, a.score_diff_high, ratio(a)
            )
        });
            let reason = format!(
                "{} of {} arms reach it, {harmless} harmless, {undecided} undecided; {mildest}; {margins}",
                there.len(),
                arms.len()
            );
            (judged, reason)
        };
    let (judged, mut reason) = reached(|a| a.cr_audited, HEADLINE_CR);
    let counted =
        most(|a| a.cr_paper, &arms.iter().filter(|a| harm(a) != Verdict::Fails).collect::<Vec<_>>());
    if counted.is_finite() {
        reason += &format!(
            "; as the paper counts (fused layers, full blocks only), {counted:.2} without proven harm"
        );
    }
    let headline = Claim {
        claim: format!("Fusion compresses {HEADLINE_CR} times with negligible loss (abstract)"),
        verdict: judged,
        reason,
    };
    // More than prefix sharing, not as much.
    let (judged, reason) = reached(|a| a.cr_beyond_prefix, 1.0 + 1e-9);
    let prefix = Claim {
        claim: "Fusion stores less than exact prefix sharing, which is lossless, at negligible loss"
            .to_owned(),
        verdict: judged,
        reason,
    };
    let scored: Vec<&Arm> = arms.iter().filter(|a| a.score_diff_low.is_finite()).collect();
    // Arms whose score shows no loss although the KL's whole interval lies well above what is negligible.
    let blind: Vec<&&Arm> =
        scored.iter().filter(|a| a.score_diff_high >= 0.0 && a.kl_low > 5.0 * NEGLIGIBLE_KL).collect();
    let unseen = most(|a| a.kl, &blind.iter().map(|a| **a).collect::<Vec<_>>());
    let score = Claim {
        claim: format!("{metric} alone tells when fusion begins to hurt"),
        verdict: if scored.is_empty() { Verdict::Undecided } else { verdict(blind.is_empty()) },
        reason: match blind.first() {
            None if scored.is_empty() => "no request has a reference to score".to_owned(),
            None => format!(
                "no arm whose KL's interval lies above {} keeps its {metric} within noise",
                5.0 * NEGLIGIBLE_KL
            ),
            Some(a) => format!(
                "{} of {} arms show no significant loss of {metric} with the KL's interval above {} (KL up to {unseen:.2}; the first: {:.3} \
                 [{:.3}, {:.3}])",
                blind.len(),
                scored.len(),
                5.0 * NEGLIGIBLE_KL,
                a.score_diff,
                a.score_diff_low,
                a.score_diff_high
            ),
        },
    };
    let fused: Vec<&Arm> = arms.iter().filter(|a| a.key_error > 1e-3).collect();
    let worse = fused.iter().filter(|a| a.value_error > a.key_error).count();
    let values = Claim {
        claim: "Values err no more than the keys that blocks are matched on".to_owned(),
        verdict: if fused.is_empty() { Verdict::Undecided } else { verdict(worse * 2 < fused.len()) },
        reason: format!(
            "values err more than keys in {worse} of {} arms that fuse more than duplicates",
            fused.len()
        ),
    };
    Ok(vec![headline, prefix, score, values])
}

fn of_predictions(table: &Table) -> Result<Vec<Claim>> {
    /// One pairing and threshold.
    #[derive(Deserialize)]
    struct Prediction {
        removed_bias: f64,
        removed_bias_low: f64,
        removed_bias_high: f64,
        removed_skill: f64,
        layers: f64,
        pairing: String,
        tau: f64,
        held_out: bool,
    }
    let claim = |model: &str, words: &str| -> Result<Claim> {
        let own = table.query(|rows| rows.filter(col("model").eq(lit(model))))?;
        let own: Vec<Prediction> = own.rows()?;
        let verdict_of = |p: &Prediction| match (
            -REMOVED <= p.removed_bias_low && p.removed_bias_high <= REMOVED,
            p.removed_bias_low > REMOVED || p.removed_bias_high < -REMOVED,
        ) {
            (true, _) => Verdict::Holds,
            (_, true) => Verdict::Fails,
            _ => Verdict::Undecided,
        };
        let of = |wanted: Verdict| own.iter().filter(|p| verdict_of(p) == wanted).count();
        let (holds, fails) = (of(Verdict::Holds), of(Verdict::Fails));
        let worst = own.iter().max_by(|a, b| a.removed_bias.abs().total_cmp(&b.removed_bias.abs()));
        let mut skills: Vec<f64> = own.iter().map(|p| p.removed_skill).filter(|s| s.is_finite()).collect();
        skills.sort_by(f64::total_cmp);
        let reason = worst.map_or("no prediction".to_owned(), |worst| {
            let whose = match own.iter().all(|p| p.held_out) {
                true => "on requests about other texts than those measured",
                false => "on the requests that were measured, which says less",
            };
            format!(
                "share of blocks removed {whose}: within {REMOVED} (95 % interval of the mean over {} layers, two one-sided tests) in {holds} of \
                 {} arms, outside in {fails}; the worst: {:+.3} [{:+.3}, {:+.3}] at tau {} ({}); median skill {} over the null that \
                 nothing but duplicates fuses",
                worst.layers,
                own.len(),
                worst.removed_bias,
                worst.removed_bias_low,
                worst.removed_bias_high,
                worst.tau,
                worst.pairing,
                skills.get(skills.len() / 2).map_or("unknown".to_owned(), |s| format!("{s:.2}")),
            )
        });
        let verdict = match own.len() {
            0 => Verdict::Undecided,
            n if holds == n => Verdict::Holds,
            _ if fails > 0 => Verdict::Fails,
            _ => Verdict::Undecided,
        };
        Ok(Claim { claim: words.to_owned(), verdict, reason })
    };
    Ok(vec![
        claim("uniform", "Similar pairs are independent and equally likely (the paper's Poisson model)")?,
        claim("by_position", "Similar pairs are independent given their positions (kvfuse's refinement)")?,
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_have_three_values() {
        assert_eq!(below(0.001, 0.01, 0.02), Verdict::Holds);
        assert_eq!(below(0.001, 0.03, 0.02), Verdict::Undecided);
        assert_eq!(below(0.021, 0.03, 0.02), Verdict::Fails);
    }

    /// Whether the score alone tells: only an arm whose KL's interval lies above 0.1 and whose score's reaches 0 denies it.
    #[test]
    fn a_score_is_blind_where_kl_is_sure() {
        let verdict = |kl_low: f64, score_high: f64| {
            let dir = tempfile::tempdir().unwrap();
            let columns = "method,metric,requests,cr_audited,cr_paper,cr_beyond_prefix,kl,kl_low,kl_high,score_diff,score_diff_low,\
                           score_diff_high,key_error,value_error";
            let none = "none,F1,64,1,1,0.5,0,0,0,0,0,0,0,0";
            let arm = format!("bff,F1,64,3,5,1.2,0.3,{kl_low},0.4,-0.05,-0.1,{score_high},0.01,0.02");
            std::fs::write(dir.path().join(SWEEP_CSV), format!("{columns}\n{none}\n{arm}\n")).unwrap();
            let found = claims(dir.path()).unwrap();
            let words = |c: &&Claim| c.claim.starts_with("F1 alone");
            found.iter().find(words).unwrap().verdict
        };
        assert_eq!(verdict(0.2, 0.01), Verdict::Fails);
        assert_eq!(verdict(0.05, 0.01), Verdict::Holds);
        assert_eq!(verdict(0.2, -0.01), Verdict::Holds);
    }
}

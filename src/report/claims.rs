//! What the paper and its reviewers say, held against the tables of one folder.

use crate::error::Result;
use crate::experiment::{Columns, SUMMARY_CSV, SWEEP_CSV};
use serde::Serialize;
use std::path::Path;

/// "Negligible loss": mean KL from no fusion that counts as none, nats a token.
const NEGLIGIBLE_KL: f64 = 0.02;
/// The paper's headline ratio (arXiv 2601.03067, abstract).
const HEADLINE_CR: f64 = 4.38;
/// A model predicts where its ratio is within this share of what is measured.
const WITHIN: f64 = 0.1;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Holds,
    Fails,
    /// The tables do not tell.
    Open,
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
        found.extend(of_sweep(&Columns::read(&sweep)?)?);
    }
    let summary = folder.join(SUMMARY_CSV);
    if summary.exists() {
        found.extend(of_predictions(&Columns::read(&summary)?)?);
    }
    Ok(found)
}

/// One fusing arm of a sweep.
struct Arm {
    cr_audited: f64,
    cr_paper: f64,
    beyond_prefix: f64,
    kl: f64,
    kl_low: f64,
    score_diff: f64,
    score_diff_low: f64,
    score_diff_high: f64,
    key_error: f64,
    value_error: f64,
}

fn of_sweep(table: &Columns) -> Result<Vec<Claim>> {
    let column = |name: &str| table.floats(name);
    let method = table.strings("method")?;
    let (audited, paper, beyond) = (column("cr_audited")?, column("cr_paper")?, column("cr_beyond_prefix")?);
    let (kl, kl_low) = (column("kl")?, column("kl_low")?);
    let diff = [column("score_diff")?, column("score_diff_low")?, column("score_diff_high")?];
    let (key, value) = (column("key_error")?, column("value_error")?);
    let arms: Vec<Arm> = (0..table.rows())
        .filter(|&i| !["none", "prefix"].contains(&&method[i][..]))
        .map(|i| Arm {
            cr_audited: audited[i],
            cr_paper: paper[i],
            beyond_prefix: beyond[i],
            kl: kl[i],
            kl_low: kl_low[i],
            score_diff: diff[0][i],
            score_diff_low: diff[1][i],
            score_diff_high: diff[2][i],
            key_error: key[i],
            value_error: value[i],
        })
        .collect();
    if arms.is_empty() {
        return Ok(Vec::new());
    }
    let harmless: Vec<&Arm> = arms.iter().filter(|a| a.kl <= NEGLIGIBLE_KL).collect();
    let most = |f: fn(&Arm) -> f64, of: &[&Arm]| of.iter().map(|a| f(a)).fold(f64::NAN, f64::max);
    let metric = table.strings("metric")?[0].clone();
    let no_harmless = || format!("no arm has a KL of {NEGLIGIBLE_KL} nats a token or less");
    let verdict = |holds: bool| if holds { Verdict::Holds } else { Verdict::Fails };

    let ratio = most(|a| a.cr_audited, &harmless);
    let headline = Claim {
        claim: format!("Fusion compresses {HEADLINE_CR} times with negligible loss (abstract)"),
        verdict: verdict(ratio >= HEADLINE_CR),
        reason: if harmless.is_empty() {
            no_harmless()
        } else {
            let paper = most(|a| a.cr_paper, &harmless);
            format!(
                "most at KL <= {NEGLIGIBLE_KL}: {ratio:.2} of the whole cache, {paper:.2} as the paper counts (fused layers, \
                 full blocks only)"
            )
        },
    };
    let over = most(|a| a.beyond_prefix, &harmless);
    let prefix = Claim {
        claim: "Fusion stores less than exact prefix sharing, which is lossless, at negligible loss"
            .to_owned(),
        verdict: verdict(over > 1.0),
        reason: if harmless.is_empty() {
            no_harmless()
        } else {
            format!("most at KL <= {NEGLIGIBLE_KL}: {over:.2} times")
        },
    };
    let scored: Vec<&Arm> = arms.iter().filter(|a| a.score_diff_low.is_finite()).collect();
    // Arms whose score shows no loss although the KL's whole interval lies well above what is negligible.
    let blind: Vec<&&Arm> =
        scored.iter().filter(|a| a.score_diff_high >= 0.0 && a.kl_low > 5.0 * NEGLIGIBLE_KL).collect();
    let unseen = most(|a| a.kl, &blind.iter().map(|a| **a).collect::<Vec<_>>());
    let score = Claim {
        claim: format!("{metric} alone tells when fusion begins to hurt"),
        verdict: if scored.is_empty() { Verdict::Open } else { verdict(blind.is_empty()) },
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
        verdict: if fused.is_empty() { Verdict::Open } else { verdict(worse * 2 < fused.len()) },
        reason: format!(
            "values err more than keys in {worse} of {} arms that fuse more than duplicates",
            fused.len()
        ),
    };
    Ok(vec![headline, prefix, score, values])
}

fn of_predictions(table: &Columns) -> Result<Vec<Claim>> {
    let (model, over) = (table.strings("model")?, table.floats("cr_over")?);
    let (pairing, tau) = (table.strings("pairing")?, table.floats("tau")?);
    let claim = |kind: &str, words: &str| {
        let own: Vec<usize> =
            (0..table.rows()).filter(|&i| model[i] == kind && over[i].is_finite()).collect();
        let holds = own.iter().filter(|&&i| (over[i] - 1.0).abs() <= WITHIN).count();
        let worst = own.iter().max_by(|&&a, &&b| over[a].ln().abs().total_cmp(&over[b].ln().abs()));
        let reason = worst.map_or("no prediction".to_owned(), |&i| {
            format!(
                "within {:.0} % of the measured ratio (median layer) in {holds} of {} arms; the worst: {} times at tau {} ({})",
                100.0 * WITHIN,
                own.len(),
                over[i],
                tau[i],
                pairing[i]
            )
        });
        let verdict = match own.len() {
            0 => Verdict::Open,
            n if holds == n => Verdict::Holds,
            _ => Verdict::Fails,
        };
        Claim { claim: words.to_owned(), verdict, reason }
    };
    Ok(vec![
        claim("uniform", "Similar pairs are independent and equally likely (the paper's Poisson model)"),
        claim("by_position", "Similar pairs are independent given their positions (kvfuse's refinement)"),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the score alone tells: only an arm whose KL's interval lies above 0.1 and whose score's reaches 0 denies it.
    #[test]
    fn a_score_is_blind_where_kl_is_sure() {
        let verdict = |kl_low: f64, score_high: f64| {
            let dir = tempfile::tempdir().unwrap();
            let columns = "method,metric,cr_audited,cr_paper,cr_beyond_prefix,kl,kl_low,score_diff,score_diff_low,\
                           score_diff_high,key_error,value_error";
            let none = "none,F1,1,1,0.5,0,0,0,0,0,0,0";
            let arm = format!("bff,F1,3,5,1.2,0.3,{kl_low},-0.05,-0.1,{score_high},0.01,0.02");
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

//! `kvfuse explain`.

use super::say;
use super::table::table;
use crate::sweep::{ExplainOptions, Explanation, FusedBlock, explain};
use anyhow::Result;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Say what an arm of a sweep did to one request: which blocks were fused with what, how similar they were, both answers.
///
/// The batch is encoded again from the dump, exactly as the sweep did.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  kvfuse explain results/qa --request 3 --method bff:tau=0.85\n  \
    kvfuse explain results/pairings --request 3 --method bff:tau=0.85,pairing=best --layer 12")]
pub struct Args {
    /// Folder that `kvfuse sweep` wrote
    out: PathBuf,
    /// Number of the request in the sweep, from 0, or its id
    #[arg(long)]
    request: String,
    /// Chain of the arm, as `kvfuse sweep --method` has it
    #[arg(long, value_name = "CHAIN")]
    method: Option<String>,
    /// Run of the arm, as sweep.csv names it
    #[arg(long)]
    run: Option<String>,
    /// Other columns of sweep.csv that tell the arm, as block_size=16
    #[arg(long, value_name = "COLUMN=VALUE", value_parser = pair)]
    only: Vec<(String, String)>,
    /// List the blocks of one layer instead of a line a block over all layers
    #[arg(long)]
    layer: Option<usize>,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write COLUMN=VALUE, as block_size=16")?;
    Ok((name.to_owned(), value.to_owned()))
}

pub fn run(args: Args) -> Result<()> {
    let options = ExplainOptions {
        out: args.out,
        request: args.request,
        run: args.run,
        method: args.method,
        only: args.only,
    };
    let e = explain(&options)?;
    if let Some(layer) = args.layer.filter(|&l| l >= e.layers) {
        anyhow::bail!("--layer {layer}: the model has layers 0 to {}", e.layers - 1);
    }
    let arm = &e.record.row.arm;
    say(format!("run        {} ({})", e.record.row.run, arm.method))?;
    say(format!("request    {}", e.score.id))?;
    say(format!("question   {}", e.question))?;
    say(format!("reference  {}", e.references.join(" | ")))?;
    let f1 = |f1: Option<f64>| f1.map_or(String::new(), |f1| format!("  (F1 {f1:.2})"));
    say(format!("no fusion  {}{}", e.plain.answer, f1(e.plain.f1)))?;
    say(format!("fused      {}{}", e.score.answer, f1(e.score.f1)))?;
    let parts = match e.score.first_divergence {
        Some(n) => format!("answers part at token {n}"),
        None => "answers are equal".to_owned(),
    };
    say(format!("drift      KL {:.4} nats a token, {parts}\n", e.score.kl))?;
    say(match args.layer {
        Some(layer) => one_layer(&e, layer),
        None => all_layers(&e),
    })?;
    say(format!(
        "\n{} of {} blocks fused over {} layers; worst relative squared error of one block {:.3}",
        e.fused.len(),
        e.texts.len() * e.layers,
        e.layers,
        e.score.worst_block_error
    ))?;
    Ok(())
}

/// The first words of a block, on one line.
fn excerpt(text: &str) -> String {
    const LENGTH: usize = 34;
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    if line.chars().count() <= LENGTH {
        line
    } else {
        line.chars().take(LENGTH - 2).collect::<String>() + ".."
    }
}

fn named(request: usize, block: usize) -> String {
    format!("{request}:{block}")
}

/// A line a block: in how many layers it was fused, with what most often, and how far off it came out.
fn all_layers(e: &Explanation) -> String {
    let rows: Vec<Vec<String>> = (0..e.texts.len())
        .map(|block| {
            let fused: Vec<&FusedBlock> = e.fused.iter().filter(|f| f.block == block).collect();
            let mut partners: BTreeMap<(usize, usize), usize> = BTreeMap::new();
            for at in fused.iter().flat_map(|f| &f.with) {
                *partners.entry((at.request, at.block)).or_default() += 1;
            }
            let most = partners.iter().max_by_key(|(at, n)| (**n, std::cmp::Reverse(**at)));
            let least = |of: fn(&FusedBlock) -> f64| {
                let least = fused.iter().map(|f| of(f)).fold(f64::INFINITY, f64::min);
                if least.is_finite() { format!("{least:.3}") } else { "-".to_owned() }
            };
            let worst = fused.iter().map(|f| f.key_error.max(f.value_error)).fold(0.0, f64::max);
            vec![
                block.to_string(),
                excerpt(&e.texts[block]),
                fused.len().to_string(),
                partners.len().to_string(),
                most.map_or("-".to_owned(), |(at, n)| format!("{} in {n}", named(at.0, at.1))),
                least(|f| f.key_cosine),
                least(|f| f.value_cosine),
                format!("{worst:.3}"),
            ]
        })
        .collect();
    let header = [
        "block",
        "text",
        "layers fused",
        "partners",
        "most often with",
        "least K cos",
        "least V cos",
        "worst error",
    ];
    table(&header, &rows)
        + "\n\n(partners are request:block; cosines are with what is read instead of the block; --layer lists one layer)"
}

/// A line a fused block of one layer, with its partners.
fn one_layer(e: &Explanation, layer: usize) -> String {
    const SHOWN: usize = 3;
    let rows: Vec<Vec<String>> = e
        .fused
        .iter()
        .filter(|f| f.layer == layer)
        .map(|f| {
            let shown: Vec<String> = f
                .with
                .iter()
                .take(SHOWN)
                .map(|p| format!("{} ({:.2} {:.2})", named(p.request, p.block), p.key_cosine, p.value_cosine))
                .collect();
            let more = f.with.len().saturating_sub(SHOWN);
            vec![
                f.block.to_string(),
                excerpt(&e.texts[f.block]),
                format!("{:.4}", f.key_cosine),
                format!("{:.4}", f.value_cosine),
                format!("{:.3}", f.key_error),
                format!("{:.3}", f.value_error),
                shown.join(" ") + &if more > 0 { format!(" and {more} more") } else { String::new() },
            ]
        })
        .collect();
    if rows.is_empty() {
        return format!("nothing of layer {layer} was fused");
    }
    table(
        &[
            "block",
            "text",
            "K cos",
            "V cos",
            "K error",
            "V error",
            "nearest partners request:block (K cos V cos)",
        ],
        &rows,
    )
}

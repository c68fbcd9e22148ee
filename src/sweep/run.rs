//! `kvfuse sweep`: every arm of the grid over one dump, resumable.

use super::arms::{Arm, ArmColumns, Packing};
use super::lot::{Lot, Piece, Source};
use super::positions::PositionRow;
use super::room;
use super::rows::{LayerRow, RequestRow, Row, Setting, Timings};
use super::runs::{RunRecord, Runs, run_id};
use super::settings::SweepOptions;
use super::stage::{check_room, record};
use crate::codec::{Chain, Method, Unfused};
use crate::dump::{Manifest, open_model};
use crate::error::{Error, IoAt, Result};
use crate::files;
use crate::lock::FolderLock;
use crate::model::kernels::instructions;
use crate::progress::{Progress, Unit};
use crate::tables::{Format, LAYERS, POSITIONS_CSV, REQUESTS, SWEEP_CSV, TIMINGS_CSV, write_table};
use serde::Serialize;
use serde_json::Value;
use std::collections::{BTreeSet, HashSet};
use std::path::Path;

/// Runs all arms that are not in `options.out` yet; returns the rows in grid order, as sweep.csv has them.
pub fn sweep(options: &SweepOptions) -> Result<Vec<Row>> {
    let out = &options.folder();
    let manifest = Manifest::read(&options.dump)?;
    let questions = questions(options, &manifest)?;
    let setting = setting(options, &manifest, &questions)?;
    let grid = options.arms()?;
    check_arms(options, &manifest, &questions, &grid)?;
    let _lock = FolderLock::take(out)?;
    files::writable_folder(out)?;
    refuse_foreign(out)?;
    let runs = Runs::open(out)?;
    let ids: Vec<String> = grid.iter().map(|arm| run_id(&setting, arm)).collect::<Result<_>>()?;
    // The unfused arm is what all others of a packing are compared with.
    let own: Vec<bool> = grid
        .iter()
        .enumerate()
        .map(|(i, arm)| options.shard.is_none_or(|s| s.has(i) || arm.chain.is_unfused()))
        .collect();
    if let Some(shard) = options.shard {
        shard.begin(out, &ids, &own)?;
    }
    let whole = |r: &RunRecord| r.requests.len() == questions.len();
    let records: Vec<Option<RunRecord>> = ids.iter().map(|id| runs.load(id).filter(whole)).collect();
    let begin = |records: &[Option<RunRecord>]| begin(out, options, &manifest, &questions, &setting, records);
    let mut work = Work {
        out,
        long_tables: options.long_tables,
        runs,
        setting: &setting,
        grid: &grid,
        ids: &ids,
        records,
    };
    let todo: Vec<(Packing, Vec<usize>)> = options
        .packings()
        .into_iter()
        .map(|packing| (packing, (0..grid.len()).filter(|&i| own[i] && grid[i].packing == packing).collect()))
        .filter(|(_, here): &(_, Vec<usize>)| here.iter().any(|&i| work.records[i].is_none()))
        .collect();
    if todo.is_empty() {
        begin(&work.records)?;
    } else {
        let model = open_model(&options.dump, options.model.as_deref(), &manifest)?;
        check_room(&model, options, &manifest, &questions)?;
        let source = Source { model: &model, options, manifest: &manifest };
        if let Some(most) = options.memory {
            room::check(source, &questions, &grid, most)?;
        }
        let lots =
            |(packing, here): &(Packing, Vec<usize>)| here.len() * questions.len().div_ceil(packing.batch);
        let progress =
            Progress::new("sweeping", todo.iter().map(lots).sum::<usize>() as u64, Unit::Items("batches"));
        for (packing, here) in todo {
            work.packing(source, &questions, packing, &here, &progress, &begin)?;
        }
        progress.finish();
    }
    Ok(work.records.into_iter().flatten().map(|r| r.row).collect())
}

/// A sweep as far as it has come.
struct Work<'a> {
    out: &'a Path,
    long_tables: Format,
    runs: Runs,
    setting: &'a Setting,
    grid: &'a [Arm],
    /// Of the grid's arms.
    ids: &'a [String],
    records: Vec<Option<RunRecord>>,
}

impl Work<'_> {
    /// Runs the arms `here` of one packing, lot after lot, so that one lot is in memory at a time. `begin` is called when the first
    /// could be loaded: until it is certain that this sweep can run, an older one's files stay as they are.
    fn packing(
        &mut self,
        source: Source,
        questions: &[usize],
        packing: Packing,
        here: &[usize],
        progress: &Progress,
        begin: &dyn Fn(&[Option<RunRecord>]) -> Result<()>,
    ) -> Result<()> {
        let lots = questions.len().div_ceil(packing.batch);
        let mut pieces: Vec<Vec<Piece>> = vec![Vec::new(); here.len()];
        let mut begun = false;
        for (n, requests) in questions.chunks(packing.batch).enumerate() {
            let mut lot: Option<Lot> = None;
            for (k, &i) in here.iter().enumerate() {
                if self.records[i].is_some() {
                    progress.increment();
                    continue;
                }
                let piece = match self.runs.load_piece(&self.ids[i], n, requests.len()) {
                    Some(piece) => piece,
                    None => {
                        // The unfused arm comes first; all others are compared with it.
                        let plain = match &self.records[here[0]] {
                            Some(record) => Some(&record.requests[n * packing.batch..][..requests.len()]),
                            None => pieces[0].get(n).map(|piece| &piece.requests[..]),
                        };
                        let lot = match &lot {
                            Some(lot) => lot,
                            None => lot.insert(Lot::new(source, requests, packing, plain)?),
                        };
                        lot.measure(&self.ids[i], &self.grid[i].chain, plain)?
                    }
                };
                if !begun {
                    begin(&self.records)?;
                    begun = true;
                }
                if n + 1 < lots {
                    self.runs.store_piece(&piece, n)?;
                    pieces[k].push(piece);
                } else {
                    let mut all = std::mem::take(&mut pieces[k]);
                    all.push(piece);
                    self.finish(i, all, here[0])?;
                }
                progress.increment();
            }
        }
        Ok(())
    }

    /// Makes the record of an arm from the pieces of all lots. `plain`: the unfused arm of its packing.
    fn finish(&mut self, i: usize, pieces: Vec<Piece>, plain: usize) -> Result<()> {
        let lots = pieces.len();
        let baseline = self.records[plain].as_ref().map(|r| &r.requests[..]);
        let record = record(self.setting, &self.grid[i], pieces, baseline);
        self.runs.store(&record)?;
        self.runs.drop_pieces(&self.ids[i], lots);
        self.records[i] = Some(record);
        write_tables(self.out, self.long_tables, &self.records)
    }
}

/// The requests to sweep: those about texts that no calibration of this sweep has seen.
pub fn questions(options: &SweepOptions, manifest: &Manifest) -> Result<Vec<usize>> {
    let mut seen: HashSet<&str> = HashSet::new();
    for file in options.thresholds() {
        if file.model_sha256 != manifest.model.sha256 {
            let problem =
                format!("was made with another model than the thresholds {} ({})", file.name, file.model);
            return Err(Error::file(&options.dump, problem));
        }
        seen.extend(file.contexts.iter().map(String::as_str));
    }
    let unseen = |i: &usize| !manifest.requests[*i].request.contexts.iter().any(|c| seen.contains(&c[..]));
    let questions: Vec<usize> =
        manifest.half(options.half, &options.dump)?.into_iter().filter(unseen).collect();
    if questions.is_empty() {
        return Err(Error::file(
            &options.dump,
            "the thresholds were calibrated on the texts of all its questions; dump more",
        ));
    }
    Ok(questions)
}

/// What all arms have in common.
pub fn setting(options: &SweepOptions, manifest: &Manifest, questions: &[usize]) -> Result<Setting> {
    let ids: Vec<&str> = questions.iter().map(|&i| &manifest.requests[i].request.id[..]).collect();
    let mut metrics: Vec<&str> =
        questions.iter().map(|&i| manifest.requests[i].request.metric.name()).collect();
    metrics.dedup();
    let limits: Vec<usize> = questions.iter().map(|&i| options.answer_limit(manifest, i)).collect();
    let most = options.longest_answer(manifest);
    let checksum = |text: &str| files::sha256_bytes(text.as_bytes())[..12].to_owned();
    Ok(Setting {
        model: manifest.model.name.clone(),
        data: manifest.data.name.clone(),
        metric: if metrics.len() == 1 { metrics[0].to_owned() } else { "mixed".to_owned() },
        dump: manifest.identity()?,
        questions: (questions.len() < manifest.requests.len()).then(|| checksum(&ids.join("\n"))),
        seed: options.seed,
        max_new_tokens: most,
        answer_limits: limits.iter().any(|l| *l != most).then(|| checksum(&format!("{limits:?}"))),
        resamples: options.resamples,
    })
}

/// What an arm asks of the dump.
fn check_arms(options: &SweepOptions, manifest: &Manifest, questions: &[usize], grid: &[Arm]) -> Result<()> {
    let labelled = questions.iter().any(|&i| !manifest.requests[i].request.tenant.is_empty());
    if options.chains.iter().any(Chain::within_tenant) && !labelled {
        let problem = "its requests carry no tenant; dump with --tenants N to use within-tenant";
        return Err(Error::file(&options.dump, problem));
    }
    let longest = questions.iter().map(|&i| manifest.requests[i].tokens - 1).max().unwrap_or(0);
    for arm in grid {
        if let Some(chunks) = arm.chain.chunks()
            && longest < chunks.least_tokens()
        {
            let problem = format!(
                "its longest prompt has {longest} tokens in the cache, cff needs {} ({} chunks of {}): dump longer \
                 prompts (--data builtin:longqa --length N) or lower chunk or fuse",
                chunks.least_tokens(),
                chunks.fuse_chunks(),
                chunks.chunk_tokens(),
            );
            return Err(Error::file(&options.dump, problem));
        }
    }
    Ok(())
}

/// A folder whose manifest.json is not a sweep's (a dump's, say) must not be written into.
fn refuse_foreign(out: &Path) -> Result<()> {
    let path = out.join("manifest.json");
    let Ok(text) = std::fs::read_to_string(&path) else { return Ok(()) };
    let manifest: Value = serde_json::from_str(&text).unwrap_or_default();
    match manifest.get("options") {
        Some(_) => Ok(()),
        None => Err(Error::file(out, "holds something that is not a sweep; choose another -o")),
    }
}

/// Writes the manifest and tables of the rows there are. Tables of another sweep go first, so that a manifest and the tables
/// beside it belong together at every moment.
fn begin(
    out: &Path,
    options: &SweepOptions,
    manifest: &Manifest,
    questions: &[usize],
    setting: &Setting,
    records: &[Option<RunRecord>],
) -> Result<()> {
    let short = [SWEEP_CSV, TIMINGS_CSV, POSITIONS_CSV].map(|name| out.join(name));
    let long = [REQUESTS, LAYERS].map(|name| Format::files(out, name));
    for table in short.into_iter().chain(long.into_iter().flatten()) {
        if table.exists() {
            std::fs::remove_file(&table).at(&table)?;
        }
    }
    let value = serde_json::json!({
        "kvfuse_version": env!("CARGO_PKG_VERSION"),
        "kernels": kernels(records).into_iter().chain([instructions()]).collect::<BTreeSet<_>>(),
        "command": options.command,
        "options": options.given,
        "questions": setting.questions,
        "contexts": manifest.contexts(questions),
        "dump": manifest.origin()?,
    });
    files::write_json(&out.join("manifest.json"), &value)?;
    if records.iter().any(Option::is_some) {
        write_tables(out, options.long_tables, records)?;
    }
    Ok(())
}

/// What finished arms were computed with.
pub(super) fn kernels(records: &[Option<RunRecord>]) -> BTreeSet<&str> {
    records.iter().flatten().map(|r| &r.kernels[..]).filter(|k| !k.is_empty()).collect()
}

/// Rewrites all tables with the rows there are, in grid order, the long ones in the format `long`.
pub(super) fn write_tables(out: &Path, long: Format, records: &[Option<RunRecord>]) -> Result<()> {
    #[derive(Serialize)]
    struct TimingRow<'a> {
        run: &'a str,
        #[serde(flatten)]
        arm: &'a ArmColumns,
        #[serde(flatten)]
        timings: &'a Timings,
        tokens_per_second: f64,
    }
    let done: Vec<&RunRecord> = records.iter().flatten().collect();
    let rows: Vec<&Row> = done.iter().map(|r| &r.row).collect();
    write_table(&out.join(SWEEP_CSV), &rows)?;
    let timings: Vec<TimingRow> = done
        .iter()
        .map(|r| TimingRow {
            run: &r.row.run,
            arm: &r.row.arm,
            timings: &r.timings,
            tokens_per_second: r.timings.generated_tokens as f64 / r.timings.decode_seconds,
        })
        .collect();
    write_table(&out.join(TIMINGS_CSV), &timings)?;
    let layers: Vec<LayerRow> = done
        .iter()
        .flat_map(|r| r.layers.iter().enumerate().map(|(layer, score)| (*r, layer, score)))
        .map(|(r, layer, score)| LayerRow { run: &r.row.run, arm: &r.row.arm, layer, score })
        .collect();
    write_table(&long.file(out, LAYERS), &layers)?;
    let positions: Vec<PositionRow> = done
        .iter()
        .flat_map(|r| r.positions.iter().map(|score| PositionRow { run: &r.row.run, arm: &r.row.arm, score }))
        .collect();
    write_table(&out.join(POSITIONS_CSV), &positions)?;
    let baseline = |r: &RunRecord| {
        let same = |b: &&&RunRecord| {
            let (a, b) = (&r.row.arm, &b.row.arm);
            b.method == Unfused::NAME
                && (b.block_size, b.batch, b.first_token) == (a.block_size, a.batch, a.first_token)
        };
        done.iter().find(same).copied()
    };
    let pairs = done.iter().filter_map(|r| Some((r, baseline(r)?)));
    let requests: Vec<RequestRow> = pairs
        .flat_map(|(r, b)| r.requests.iter().zip(&b.requests).map(|(s, b)| RequestRow::new(&r.row, s, b)))
        .collect();
    // None where the arm that all are compared with is still to come.
    if requests.is_empty() {
        return Ok(());
    }
    write_table(&long.file(out, REQUESTS), &requests)
}

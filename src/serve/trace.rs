//! Traces of real services: when requests came, how long they were, and which blocks they had in common. None carries text, so text
//! comes from our data.

use super::job::Job;
use crate::error::{Error, IoAt, Result};
use crate::files;
use crate::model::Model;
use crate::tables::Table;
use crate::task::{Draw, Request, prose};
use chrono::NaiveDateTime;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Which trace, and how it is fitted to a small machine.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TraceOptions {
    /// `mooncake:FILE`, `azure:FILE` or `burstgpt:FILE`.
    pub spec: String,
    /// What lengths are multiplied by.
    pub scale: f64,
    /// How many times as fast requests come.
    pub speed: f64,
}

/// One request of a trace, as the file has it.
#[derive(Debug, Clone, PartialEq)]
struct Entry {
    seconds: f64,
    input_tokens: f64,
    output_tokens: f64,
    /// Ids of its blocks of [`BLOCK`] tokens: those with the same id have the same text. Empty where the trace does not say.
    blocks: Vec<u64>,
}

/// Tokens of a block of Mooncake's traces.
const BLOCK: f64 = 512.0;

/// A line of Mooncake's JSON lines (Qin et al. 2024, "Mooncake").
#[derive(Deserialize)]
struct MooncakeLine {
    /// Milliseconds.
    timestamp: f64,
    input_length: f64,
    output_length: f64,
    hash_ids: Vec<u64>,
}

/// Requests of a trace with text of ours, and the seconds at which they come.
pub struct Replayed {
    pub requests: Vec<Request>,
    pub jobs: Vec<Job>,
    pub seconds: Vec<f64>,
    /// Of the trace's file and of the text.
    pub sha256: String,
}

impl TraceOptions {
    fn source(&self) -> Result<(&str, PathBuf)> {
        let known = self
            .spec
            .split_once(':')
            .filter(|(kind, file)| ["mooncake", "azure", "burstgpt"].contains(kind) && !file.is_empty());
        let unknown = || format!("--trace {}: use mooncake:FILE, azure:FILE or burstgpt:FILE", self.spec);
        known.map(|(kind, file)| (kind, PathBuf::from(file))).ok_or_else(|| Error::argument(unknown()))
    }

    /// What can be said before there is a model.
    pub fn check(&self, draw: &Draw) -> Result<()> {
        let (_, path) = self.source()?;
        let fixed = [
            ("--passages", draw.passages.is_some()),
            ("--turns", draw.turns.is_some()),
            ("--length", draw.length.is_some()),
            ("--limit", draw.limit.is_some()),
            ("--continuation", draw.continuation.is_some()),
            ("--tenants", draw.tenants > 0),
            ("--needles", draw.needles != 1),
        ];
        if let Some((name, _)) = fixed.iter().find(|(_, given)| *given) {
            return Err(Error::argument(format!(
                "{name} does not go with --trace, which says how long prompts are"
            )));
        }
        let sound = |x: f64| x > 0.0 && x.is_finite();
        for (name, x) in [("--trace-scale", self.scale), ("--trace-speed", self.speed)] {
            if !sound(x) {
                return Err(Error::argument(format!("{name} {x}: must be above 0")));
            }
        }
        std::fs::metadata(&path).at(&path).map(|_| ())
    }

    /// The trace's first `draw.requests` requests that were answered, with text of `draw`'s data.
    ///
    /// # Errors
    /// Files of another format, with line or column; fewer requests than asked for; data without prose.
    pub fn replay(&self, draw: &Draw, model: &Model) -> Result<Replayed> {
        let (kind, path) = self.source()?;
        let entries = match kind {
            "mooncake" => mooncake(&path, &files::read_text(&path)?)?,
            "azure" => azure(&path)?,
            _ => burstgpt(&path)?,
        };
        let answered = |e: &Entry| e.input_tokens >= 1.0 && e.output_tokens >= 1.0;
        let mut taken: Vec<Entry> = entries.into_iter().filter(answered).take(draw.requests).collect();
        taken.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        if taken.len() < draw.requests {
            let problem =
                format!("has {} answered requests, fewer than --requests {}", taken.len(), draw.requests);
            return Err(Error::file(&path, problem));
        }
        let first = taken.iter().map(|e| e.seconds).fold(f64::INFINITY, f64::min);
        let (prose, data) = prose(draw)?;
        let ring = Ring { tokens: model.tokenizer.encode(&prose)?, seed: draw.seed };
        if ring.tokens.is_empty() {
            let message = format!("--data {}: has no text to fill a trace's prompts with", draw.spec);
            return Err(Error::argument(message));
        }
        let room = model.decoder.context();
        let long =
            |e: &&Entry| tokens(e.input_tokens, self.scale) + tokens(e.output_tokens, self.scale) > room;
        if let Some(entry) = taken.iter().find(long) {
            return Err(Error::argument(format!(
                "--trace-scale {}: a request of {} and {} tokens exceeds the model's context of {room}; use a smaller one",
                self.scale, entry.input_tokens, entry.output_tokens
            )));
        }
        let mut requests = Vec::new();
        let mut jobs = Vec::new();
        for (i, entry) in taken.iter().enumerate() {
            let mut prompt = model.tokenizer.encode_prompt("")?;
            ring.fill(&mut prompt, entry, i, self.scale);
            requests.push(Request::raw(format!("trace-{}", i + 1), String::new()));
            jobs.push(Job {
                id: i as u64,
                tenant: String::new(),
                prompt,
                max_tokens: tokens(entry.output_tokens, self.scale),
                stop: Vec::new(),
                ignore_end: true,
                keep_logits: 0,
            });
        }
        let seconds = taken.iter().map(|e| (e.seconds - first) / self.speed).collect();
        let sha256 = files::sha256_bytes((files::sha256(&path)? + &data).as_bytes());
        Ok(Replayed { requests, jobs, seconds, sha256 })
    }
}

fn tokens(of_the_trace: f64, scale: f64) -> usize {
    (of_the_trace * scale).round().max(1.0) as usize
}

/// Tokens of a text, read round and round.
struct Ring {
    tokens: Vec<u32>,
    seed: u64,
}

impl Ring {
    /// Fills a prompt up to the entry's length: a stretch a block, from a place that its id decides.
    fn fill(&self, prompt: &mut Vec<u32>, entry: &Entry, request: usize, scale: f64) {
        let length = tokens(entry.input_tokens, scale);
        let block = tokens(BLOCK, scale);
        let mut number = 0;
        while prompt.len() < length {
            let name = match entry.blocks.get(number) {
                Some(id) => format!("{}:{id}", self.seed),
                // Nothing is known to be shared.
                None => format!("{}:request-{request}-{number}", self.seed),
            };
            let from = self.place(&name);
            // The token that begins every text takes the place of the first block's first.
            let until = ((number + 1) * block).min(length);
            let missing = until.saturating_sub(prompt.len());
            prompt.extend((0..missing).map(|k| self.tokens[(from + k) % self.tokens.len()]));
            number += 1;
        }
    }

    fn place(&self, name: &str) -> usize {
        let sum = files::sha256_bytes(name.as_bytes());
        usize::from_str_radix(&sum[..12], 16).unwrap_or(0) % self.tokens.len()
    }
}

fn mooncake(path: &Path, text: &str) -> Result<Vec<Entry>> {
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
    let entry = |(n, line): (usize, &str)| -> Result<Entry> {
        let line: MooncakeLine = serde_json::from_str(line)
            .map_err(|e| Error::file(path, format!("line {n} is not a line of a Mooncake trace: {e}")))?;
        Ok(Entry {
            seconds: line.timestamp * 1e-3,
            input_tokens: line.input_length,
            output_tokens: line.output_length,
            blocks: line.hash_ids,
        })
    };
    lines.map(entry).collect()
}

/// Azure's traces of LLM inference (2023 and 2024): `TIMESTAMP,ContextTokens,GeneratedTokens`.
fn azure(path: &Path) -> Result<Vec<Entry>> {
    let table = Table::read(path)?;
    let (input, output) = (table.floats("ContextTokens")?, table.floats("GeneratedTokens")?);
    let time = |(n, text): (usize, String)| -> Result<f64> {
        let plain = text.trim_end_matches("+00:00").replace('T', " ");
        let time = NaiveDateTime::parse_from_str(&plain, "%Y-%m-%d %H:%M:%S%.f").map_err(|e| {
            Error::file(path, format!("line {}: {text:?} is no time as 2023-11-16 18:17:03.98: {e}", n + 2))
        })?;
        Ok(time.and_utc().timestamp_micros() as f64 * 1e-6)
    };
    let seconds: Vec<f64> =
        table.strings("TIMESTAMP")?.into_iter().enumerate().map(time).collect::<Result<_>>()?;
    entries(path, &seconds, &input, &output)
}

/// BurstGPT (Wang et al. 2024): `Timestamp` in seconds, `Request tokens`, `Response tokens` and others. Those without a response failed.
fn burstgpt(path: &Path) -> Result<Vec<Entry>> {
    let table = Table::read(path)?;
    let of = |name: &str| table.floats(name);
    entries(path, &of("Timestamp")?, &of("Request tokens")?, &of("Response tokens")?)
}

fn entries(path: &Path, seconds: &[f64], input: &[f64], output: &[f64]) -> Result<Vec<Entry>> {
    let entry = |i: usize| -> Result<Entry> {
        if [seconds[i], input[i], output[i]].iter().any(|x| !x.is_finite()) {
            let problem = format!("line {}: a time or a count of tokens is not a number", i + 2);
            return Err(Error::file(path, problem));
        }
        Ok(Entry {
            seconds: seconds[i],
            input_tokens: input[i],
            output_tokens: output[i],
            blocks: Vec::new(),
        })
    };
    (0..seconds.len()).map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Prompts share what their blocks have in common, and nothing more than chance behind it.
    #[test]
    fn equal_blocks_have_equal_text() {
        let ring = Ring { tokens: (0..10_007).collect(), seed: 3 };
        let prompt = |blocks: &[u64], length: f64, request: usize| {
            let entry =
                Entry { seconds: 0.0, input_tokens: length, output_tokens: 1.0, blocks: blocks.to_vec() };
            let mut prompt = vec![77_777];
            ring.fill(&mut prompt, &entry, request, 0.125);
            prompt
        };
        let (a, b) = (prompt(&[5, 6, 7], 1400.0, 0), prompt(&[5, 6, 8], 1500.0, 1));
        assert_eq!((a.len(), b.len()), (175, 188));
        assert_eq!(a[..128], b[..128]);
        assert_ne!(a[128..160], b[128..160]);
        let (c, d) = (prompt(&[], 800.0, 0), prompt(&[], 800.0, 1));
        assert_eq!(c.len(), 100);
        assert_ne!(c[1..20], d[1..20]);
    }

    #[test]
    fn formats_are_read_as_they_are_published() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let line =
            "{\"timestamp\": 27482, \"input_length\": 6955, \"output_length\": 52, \"hash_ids\": [46, 47]}\n";
        let read = mooncake(Path::new("m"), line).unwrap();
        assert_eq!(
            (read[0].seconds, read[0].input_tokens, &read[0].blocks[..]),
            (27.482, 6955.0, &[46, 47][..])
        );
        let bad = mooncake(Path::new("m"), &format!("{line}{{}}\n")).unwrap_err().to_string();
        assert!(bad.contains("line 2") && bad.contains("timestamp"), "{bad}");
        let text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n\
            2023-11-16 18:17:04.5000000,110,27\n";
        let read = azure(&file("azure.csv", text)).unwrap();
        assert!((read[1].seconds - read[0].seconds - 0.52004).abs() < 1e-4);
        assert_eq!((read[1].input_tokens, read[1].output_tokens), (110.0, 27.0));
        let later = text.replace("03.9799600", "03.979960+00:00").replace("04.5000000", "04.500000+00:00");
        assert_eq!(azure(&file("azure-2024.csv", &later)).unwrap(), read);
        let text = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n\
            5,,1.2,ChatGPT,472,18,490,Conversation log\n45,s1,0,GPT-4,1087,0,1087,API log\n";
        let read = burstgpt(&file("burst.csv", text)).unwrap();
        assert_eq!((read[1].seconds, read[0].input_tokens, read[1].output_tokens), (45.0, 472.0, 0.0));
    }
}

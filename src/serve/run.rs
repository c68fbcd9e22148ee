//! One run: requests handed to an engine as they arrive, and what came of it.

use super::engine::Engine;
use super::job::{Counts, Finish, Job, Limits};
use super::metrics::Served;
use super::policy::Policy;
use crate::error::Result;
use crate::interrupt;
use crate::memory::resident;
use crate::model::Model;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// A request and when it comes, in seconds.
#[derive(Debug, Clone)]
pub struct Arrival {
    pub seconds: f64,
    /// The one that must have ended before: the turn of the conversation before it.
    pub after: Option<usize>,
    pub job: Job,
}

/// How the engine stood at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Moment {
    pub seconds: f64,
    pub running: usize,
    pub waiting: usize,
    pub pages: usize,
    pub bytes: usize,
    /// Of the process.
    pub rss_bytes: usize,
}

/// All that came of a run.
pub struct Outcome {
    pub duration: f64,
    pub served: Vec<Served>,
    /// Tokens of every answer, and the logits that were kept of them.
    pub answers: Vec<Vec<u32>>,
    pub logits: Vec<Vec<Vec<f32>>>,
    pub counts: Counts,
    pub moments: Vec<Moment>,
    pub max_concurrent: usize,
}

/// Seconds between two looks at the engine.
const LOOK_EVERY: f64 = 0.1;

/// Serves all requests; at most `concurrency` are in the engine at once. Jobs must be numbered as they come. A turn of a conversation
/// comes when its time has come and the turn before has ended.
///
/// # Errors
/// What the engine fails on; an interruption.
pub fn serve(
    model: &Model,
    limits: Limits,
    policy: Policy,
    arrivals: &[Arrival],
    concurrency: usize,
) -> Result<Outcome> {
    let mut engine = Engine::new(model, limits, policy);
    let n = arrivals.len();
    let mut out = Outcome {
        duration: 0.0,
        served: arrivals
            .iter()
            .map(|a| Served { arrival: a.seconds, input_tokens: a.job.prompt.len(), ..Served::default() })
            .collect(),
        answers: vec![Vec::new(); n],
        logits: vec![Vec::new(); n],
        counts: Counts::default(),
        moments: Vec::new(),
        max_concurrent: 0,
    };
    let started = Instant::now();
    let mut left: Vec<usize> = (0..n).collect();
    let mut inside = 0;
    while !left.is_empty() || inside > 0 {
        interrupt::check()?;
        let now = started.elapsed().as_secs_f64();
        left.retain(|&i| {
            let arrival = &arrivals[i];
            let before = arrival.after.map(|before| &out.served[before]);
            if inside == concurrency || arrival.seconds > now || before.is_some_and(|b| b.end == 0.0) {
                return true;
            }
            // With all at once and few let in, a client sends its next when its last has ended.
            let ended = before.map_or(0.0, |b| b.end);
            out.served[i].arrival = if arrival.seconds > 0.0 { arrival.seconds.max(ended) } else { now };
            engine.submit(arrival.job.clone());
            inside += 1;
            false
        });
        if inside == 0 {
            let wait = left.iter().map(|&i| arrivals[i].seconds - now).fold(0.05, f64::min);
            std::thread::sleep(Duration::from_secs_f64(wait.max(0.0)));
            continue;
        }
        for event in engine.step()? {
            let now = started.elapsed().as_secs_f64();
            let i = event.id as usize;
            if let Some(token) = event.token {
                out.answers[i].push(token);
                out.served[i].tokens.push(now);
            }
            out.logits[i].extend(event.logits);
            if let Some(finish) = event.finish {
                out.served[i].end = now;
                out.served[i].failed = matches!(finish, Finish::TooLarge | Finish::Aborted);
                inside -= 1;
            }
        }
        out.max_concurrent = out.max_concurrent.max(engine.running());
        let now = started.elapsed().as_secs_f64();
        if out.moments.last().is_none_or(|m| now - m.seconds >= LOOK_EVERY) {
            out.moments.push(Moment {
                seconds: now,
                running: engine.running(),
                waiting: engine.waiting(),
                pages: engine.pages(),
                bytes: engine.bytes(),
                rss_bytes: resident().0,
            });
        }
    }
    out.duration = started.elapsed().as_secs_f64();
    out.counts = engine.counts();
    Ok(out)
}

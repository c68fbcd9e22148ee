//! The thread that owns the engine: takes requests in between two steps and hands tokens to whoever waits for them.

use super::metrics::Metrics;
use crate::error::Result;
use crate::model::Model;
use crate::serve::engine::Engine;
use crate::serve::job::{Event, Job, Limits};
use crate::serve::policy::Policy;
use std::collections::HashMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;

/// What connections ask of the worker.
pub enum Command {
    Submit { job: Job, events: UnboundedSender<Event> },
    Abort(u64),
    Stop,
}

/// A request whose connection waits.
struct Waiting {
    events: UnboundedSender<Event>,
    arrived: Instant,
    last: Option<Instant>,
    prompt_tokens: usize,
}

/// Calls a request off when its connection ends, however it ends.
pub struct OnDrop {
    pub id: u64,
    pub commands: Sender<Command>,
}

impl Drop for OnDrop {
    fn drop(&mut self) {
        // A worker that has ended holds nothing that could be called off.
        let _ = self.commands.send(Command::Abort(self.id));
    }
}

/// How long to wait for a command where nothing runs.
const IDLE: Duration = Duration::from_millis(200);

/// Serves until it is told to stop and all that runs has ended, or been called off.
///
/// # Errors
/// What the engine fails on.
pub fn work(
    model: &Model,
    limits: Limits,
    policy: Policy,
    commands: &Receiver<Command>,
    metrics: &Metrics,
) -> Result<()> {
    let mut engine = Engine::new(model, limits, policy);
    let mut waiting: HashMap<u64, Waiting> = HashMap::new();
    let mut stopping = false;
    loop {
        // Without work, sleep until there is some.
        let first = match engine.is_idle() {
            true if stopping => return Ok(()),
            true => match commands.recv_timeout(IDLE) {
                Ok(command) => Some(command),
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            },
            false => None,
        };
        for command in first.into_iter().chain(commands.try_iter()) {
            match command {
                Command::Submit { job, events } => {
                    let prompt_tokens = job.prompt.len();
                    waiting.insert(
                        job.id,
                        Waiting { events, arrived: Instant::now(), last: None, prompt_tokens },
                    );
                    engine.submit(job);
                }
                Command::Abort(id) => {
                    if waiting.contains_key(&id) {
                        engine.abort(id);
                    }
                }
                Command::Stop => {
                    stopping = true;
                    waiting.keys().copied().collect::<Vec<_>>().into_iter().for_each(|id| engine.abort(id));
                }
            }
        }
        let events = engine.step()?;
        metrics.engine(&engine);
        for event in events {
            tell(&mut waiting, event, metrics);
        }
    }
}

fn tell(waiting: &mut HashMap<u64, Waiting>, event: Event, metrics: &Metrics) {
    let (id, finish) = (event.id, event.finish);
    let Some(request) = waiting.get_mut(&id) else { return };
    let now = Instant::now();
    if event.token.is_some() {
        metrics.token(now - request.last.unwrap_or(request.arrived), request.last.is_none());
        request.last = Some(now);
    }
    // A connection that is gone calls its request off by itself.
    let _ = request.events.send(event);
    if let Some(finish) = finish
        && let Some(request) = waiting.remove(&id)
    {
        metrics.finished(super::api::reason(finish), request.prompt_tokens, now - request.arrived);
    }
}

//! Routes, and the life of the server.

use super::api::{Body, Detokenizer, Envelope, Refusal, usage};
use super::metrics::Metrics;
use super::worker::{Command, OnDrop, work};
use crate::codec::Chain;
use crate::error::{Error, Result};
use crate::interrupt;
use crate::model::Model;
use crate::serve::job::{Event, Finish, Job, Limits};
use crate::serve::policy::Policy;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{StatusCode, header};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use axum::{Json, Router};
use serde_json::{Value, json};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;

/// How to serve.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// What `--model` means; clients know it by this name.
    pub model: String,
    pub chain: Chain,
    pub limits: Limits,
    pub address: SocketAddr,
    /// Requests that are open at once; more are turned away.
    pub open: usize,
}

/// Bytes of a request's body, at most.
const LARGEST_BODY: usize = 8 << 20;

/// How often the server looks whether it is to stop.
const LOOK_EVERY: Duration = Duration::from_millis(50);

struct Server {
    model: Arc<Model>,
    name: String,
    limits: Limits,
    commands: Sender<Command>,
    metrics: Arc<Metrics>,
    next: AtomicU64,
    open: Arc<AtomicUsize>,
    most_open: usize,
}

/// Serves until Ctrl-C; `ready` is told the address once it is bound.
///
/// # Errors
/// A model that cannot be loaded, an address that is taken, what the engine fails on.
pub fn run(options: &ServerOptions, ready: impl FnOnce(SocketAddr)) -> Result<()> {
    let model = Arc::new(Model::load(&options.model)?);
    let policy = Policy::of(&options.chain, model.decoder.block_shape(options.limits.block_size))?;
    let metrics = Arc::new(Metrics::new(options.limits.budget_bytes));
    let (commands, inbox) = channel();
    let server = Arc::new(Server {
        model: Arc::clone(&model),
        name: options.model.clone(),
        limits: options.limits,
        commands: commands.clone(),
        metrics: Arc::clone(&metrics),
        next: AtomicU64::new(0),
        open: Arc::default(),
        most_open: options.open,
    });
    let refused = |e: std::io::Error| Error::argument(format!("{}: {e}", options.address));
    // The engine computes on threads of its own; connections need one.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.map_err(refused)?;
    let listener = runtime.block_on(tokio::net::TcpListener::bind(options.address)).map_err(refused)?;
    ready(listener.local_addr().map_err(refused)?);
    let limits = options.limits;
    let ended = Arc::new(AtomicBool::new(false));
    let tell = Arc::clone(&ended);
    let worker = std::thread::spawn(move || {
        let result = work(&model, limits, policy, &inbox, &metrics);
        tell.store(true, Ordering::SeqCst);
        result
    });
    let over = async move {
        while !interrupt::is_set() && !ended.load(Ordering::SeqCst) {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        // A worker that has failed needs no telling.
        let _ = commands.send(Command::Stop);
    };
    // A token's event is sent when it is made, not when the one before was acknowledged.
    let listener = listener.tap_io(|connection| {
        let _ = connection.set_nodelay(true);
    });
    let served =
        runtime.block_on(async { axum::serve(listener, router(server)).with_graceful_shutdown(over).await });
    let worked = worker.join().unwrap_or_else(|_| Err(Error::argument("the engine stopped")));
    worked.and(served.map_err(refused))
}

fn router(server: Arc<Server>) -> Router {
    let answers = |chat: bool| {
        post(move |State(server): State<Arc<Server>>, body: axum::body::Bytes| async move {
            answer(&server, &body, chat).await.unwrap_or_else(refuse)
        })
    };
    Router::new()
        .route("/v1/completions", answers(false))
        .route("/v1/chat/completions", answers(true))
        .route("/v1/models", get(models))
        .route("/health", get(|| async { StatusCode::OK }))
        .route("/version", get(|| async { Json(json!({"version": env!("CARGO_PKG_VERSION")})) }))
        .route("/metrics", get(metrics))
        .fallback(|| async {
            let message = "no such path; there are /v1/completions, /v1/chat/completions, /v1/models, /metrics and /health";
            refuse(Refusal { status: 404, message: message.to_owned(), param: None })
        })
        .layer(DefaultBodyLimit::max(LARGEST_BODY))
        .with_state(server)
}

fn refuse(refusal: Refusal) -> Response {
    let status = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, Json(refusal.body())).into_response()
}

async fn models(State(server): State<Arc<Server>>) -> Json<Value> {
    let model = json!({"id": server.name, "object": "model", "created": now(), "owned_by": "kvfuse",
        "max_model_len": server.model.decoder.context()});
    Json(json!({"object": "list", "data": [model]}))
}

async fn metrics(State(server): State<Arc<Server>>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], server.metrics.text()).into_response()
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// A request in the engine, and who is told of it.
struct Open {
    events: UnboundedReceiver<Event>,
    envelope: Envelope,
    prompt_tokens: usize,
    text: Detokenizer,
    /// Calls it off when the connection goes.
    _guard: (OnDrop, CountDown),
}

/// One of the open requests less.
struct CountDown(Arc<AtomicUsize>);

impl Drop for CountDown {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Server {
    /// Hands a job to the engine.
    fn open(&self, job: Job, chat: bool) -> std::result::Result<Open, Refusal> {
        let size = self.limits.block_size;
        let columns = (job.prompt.len() + job.max_tokens).div_ceil(size);
        let needed = columns * self.model.decoder.column_bytes(size);
        if needed > self.limits.budget_bytes {
            let message = format!(
                "the request may need {needed} bytes of KV cache, the server has {}; ask for fewer tokens",
                self.limits.budget_bytes
            );
            return Err(Refusal { status: 400, message, param: Some("max_tokens") });
        }
        let count = CountDown(Arc::clone(&self.open));
        if self.open.fetch_add(1, Ordering::SeqCst) >= self.most_open {
            let message = format!("{} requests are open already; try again later", self.most_open);
            return Err(Refusal { status: 503, message, param: None });
        }
        let id = self.next.fetch_add(1, Ordering::SeqCst);
        let (events, inbox) = unbounded_channel();
        let (prompt_tokens, stop) = (job.prompt.len(), job.stop.clone());
        let gone = |_| Refusal { status: 503, message: "the server stops".to_owned(), param: None };
        self.commands.send(Command::Submit { job: Job { id, ..job }, events }).map_err(gone)?;
        let kind = if chat { "chatcmpl" } else { "cmpl" };
        Ok(Open {
            events: inbox,
            envelope: Envelope { id: format!("{kind}-{id}"), model: self.name.clone(), created: now(), chat },
            prompt_tokens,
            text: Detokenizer::new(stop),
            _guard: (OnDrop { id, commands: self.commands.clone() }, count),
        })
    }
}

async fn answer(server: &Arc<Server>, body: &[u8], chat: bool) -> std::result::Result<Response, Refusal> {
    let body: Body = serde_json::from_slice(body).map_err(|e| Refusal {
        status: 400,
        message: format!("the body is no usable JSON: {e}"),
        param: None,
    })?;
    let counts = body.stream_options.as_ref().is_some_and(|o| o.include_usage);
    let streams = body.stream;
    let job = body.job(&server.model, &server.name, chat)?;
    let open = server.open(job, chat)?;
    match streams {
        true => Ok(stream(Arc::clone(server), open, counts)),
        false => whole(server, open).await,
    }
}

/// The engine ended while a request was open.
fn broken(problem: impl ToString) -> Refusal {
    Refusal { status: 500, message: problem.to_string(), param: None }
}

async fn whole(server: &Server, mut open: Open) -> std::result::Result<Response, Refusal> {
    let mut text = String::new();
    while let Some(event) = open.events.recv().await {
        let last = event.finish.is_some();
        text += &open.text.push(&server.model.tokenizer, event.token, last).map_err(broken)?;
        match event.finish {
            None => {}
            Some(Finish::Aborted) => {
                return Err(Refusal { status: 503, message: "the server stops".to_owned(), param: None });
            }
            Some(finish) => {
                let usage = usage(open.prompt_tokens, open.text.tokens());
                return Ok(Json(open.envelope.whole(&text, finish, usage)).into_response());
            }
        }
    }
    Err(broken("the engine stopped"))
}

/// Server-sent events, one for every token that makes text.
fn stream(server: Arc<Server>, open: Open, counts: bool) -> Response {
    let (out, events) = unbounded_channel::<std::result::Result<sse::Event, Infallible>>();
    tokio::spawn(async move {
        // All of it, with the guard that calls the request off at the end.
        let mut open = open;
        let send = |value: &Value| out.send(Ok(sse::Event::default().data(value.to_string()))).is_ok();
        let mut first = true;
        loop {
            let event = tokio::select! {
                event = open.events.recv() => event,
                // The client hung up: what was opened is called off as it is dropped.
                () = out.closed() => return,
            };
            let Some(event) = event else {
                send(&broken("the engine stopped").body());
                return;
            };
            let Ok(text) = open.text.push(&server.model.tokenizer, event.token, event.finish.is_some())
            else {
                send(&broken("a token cannot be decoded").body());
                return;
            };
            // Every token is told of, also where its text is yet to come: clients measure latency by it.
            if event.token.is_some() || event.finish.is_some() || !text.is_empty() {
                send(&open.envelope.piece(&text, first, event.finish));
                first = false;
            }
            if event.finish.is_some() {
                if counts {
                    send(&open.envelope.counted(usage(open.prompt_tokens, open.text.tokens())));
                }
                let _ = out.send(Ok(sse::Event::default().data("[DONE]")));
                return;
            }
        }
    });
    Sse::new(UnboundedReceiverStream::new(events)).keep_alive(KeepAlive::default()).into_response()
}

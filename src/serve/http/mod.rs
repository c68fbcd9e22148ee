//! `kvfuse serve`: the engine behind OpenAI's HTTP interface.

mod api;
mod metrics;
mod routes;
mod worker;

pub use routes::{ServerOptions, run};

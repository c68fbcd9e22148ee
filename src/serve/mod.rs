//! A paged serving engine over the pool, tables and chains that sweeps use.

mod arrivals;
mod bench;
mod engine;
mod fuse;
pub mod http;
mod job;
mod metrics;
mod migrate;
mod policy;
mod prefix;
mod quality;
mod record;
mod returns;
mod roofline;
mod run;
mod tier;
mod trace;

pub use arrivals::Arrivals;
pub use bench::{BenchOptions, Budget, bench};
pub use engine::Engine;
pub use job::{Counts, Event, Finish, Job, Limits};
pub use metrics::{Goal, Served, fields};
pub use migrate::{MIGRATION_CSV, MigrateOptions, MigrateRow, migrate};
pub use policy::Policy;
pub use quality::{Witness, divergences};
pub use record::{SERVE_CSV, SERVE_REQUESTS_CSV, SERVE_SUMMARY_CSV, SERVE_TIMELINE_CSV, ServeRow, summary};
pub use roofline::{PROJECTION_CSV, ProjectOptions, Projected, ROOFLINE_CSV, project};
pub use run::{Arrival, Moment, Outcome, serve};
pub use trace::TraceOptions;

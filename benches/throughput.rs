//! `cargo bench`: the report of `kvfuse bench`.

use clap::Parser;
use kvfuse::cli::Cli;

fn main() {
    if let Err(error) = Cli::parse_from(["kvfuse", "bench"]).run() {
        eprintln!("error: {error:#}");
        std::process::exit(2);
    }
}

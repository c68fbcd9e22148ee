//! `kvfuse completions` and `kvfuse man`.

use super::{Cli, say};
use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::Shell;
use std::io::Write;

/// Print completions for a shell.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  kvfuse completions bash > ~/.local/share/bash-completion/completions/kvfuse"
)]
pub struct Args {
    shell: Shell,
}

pub fn run(args: Args) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "kvfuse", &mut script);
    say(String::from_utf8_lossy(&script).trim_end())?;
    Ok(())
}

/// Print the manual page, all commands in one.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  kvfuse man | man -l -")]
pub struct ManArgs {}

pub fn man(_args: ManArgs) -> Result<()> {
    let mut page = Vec::new();
    let mut command = Cli::command();
    // Sub-commands learn their full names and the global options.
    command.build();
    clap_mangen::Man::new(command.clone()).render(&mut page).context("manual page")?;
    for sub in command.get_subcommands().filter(|s| s.get_name() != "help") {
        let name = format!("kvfuse {}", sub.get_name());
        writeln!(page, ".SH {}", name.to_uppercase()).context("manual page")?;
        let man = clap_mangen::Man::new(sub.clone());
        man.render_description_section(&mut page).context("manual page")?;
        man.render_options_section(&mut page).context("manual page")?;
        man.render_extra_section(&mut page).context("manual page")?;
    }
    say(String::from_utf8_lossy(&page).trim_end())?;
    Ok(())
}

//! What a shell sees: help with an example in every command, completions, a manual page, silence when asked for.

mod common;

use common::{run, small_dump, succeed, text};

const COMMANDS: [&str; 27] = [
    "serve",
    "serve-bench",
    "plan",
    "merge",
    "search",
    "train",
    "sensitivity",
    "encode",
    "decode",
    "methods",
    "dump",
    "inspect",
    "sweep",
    "calibrate",
    "explain",
    "stats",
    "simulate",
    "plot",
    "run",
    "compare",
    "check",
    "report",
    "demo",
    "bench",
    "completions",
    "man",
    "model",
];

#[test]
fn every_command_has_help_and_all_but_groups_an_example() {
    let top = succeed(&["--help"]);
    for word in ["KVFUSE_HOME", "HF_TOKEN", "NO_COLOR", "Exit status"] {
        assert!(top.contains(word), "{word}");
    }
    for command in COMMANDS {
        assert!(top.contains(&format!("\n  {command}")), "{command} is missing in {top}");
        let help = succeed(&[command, "--help"]);
        assert!(command == "model" || help.contains("Example"), "{command}: {help}");
        // Lines of the examples name commands and options that exist.
        for line in help.lines().filter(|l| l.starts_with("  kvfuse ")) {
            let words: Vec<&str> = line.split_whitespace().collect();
            assert!(COMMANDS.contains(&words[1]), "{line}");
            let own = succeed(&[words[1], "--help"]);
            for option in words.iter().filter(|w| w.starts_with("--")) {
                assert!(own.contains(option), "{line}: {option}");
            }
        }
    }
}

#[test]
fn completions_and_manual() {
    for shell in ["bash", "zsh", "fish"] {
        let script = succeed(&["completions", shell]);
        for command in COMMANDS {
            assert!(script.contains(command), "{shell}: {command}");
        }
    }
    let page = succeed(&["man"]);
    assert!(page.starts_with(".ie") || page.contains(".TH"), "{}", &page[..200]);
    assert!(page.contains("KVFUSE SWEEP") && page.contains("target\\-kl"));
}

#[test]
fn quiet_commands_say_nothing_on_stderr() {
    let output = run(&["inspect", text(small_dump()), "--quiet"]);
    assert!(output.status.success());
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    let loud = run(&["inspect", text(small_dump())]);
    assert!(!loud.stderr.is_empty());
}

/// Every chain that a document or a help text shows means something.
#[test]
fn chains_in_documents_are_valid() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut texts: Vec<String> = COMMANDS.iter().map(|command| succeed(&[command, "--help"])).collect();
    let documents = std::fs::read_dir(root.join("docs")).unwrap().map(|e| e.unwrap().path());
    let others = ["README.md", "Justfile", "results/README.md"].map(|name| root.join(name));
    texts.extend(documents.chain(others).map(|path| std::fs::read_to_string(path).unwrap()));
    let mut found = 0;
    for text in &texts {
        for after in text.split("--method ").skip(1) {
            let word = match after.strip_prefix('\'') {
                Some(quoted) => quoted.split('\'').next().unwrap(),
                None => after.split([' ', '\n', '`', ')']).next().unwrap(),
            };
            // Placeholders of the help itself.
            if !word.starts_with('<') && !word.chars().all(|c| c.is_ascii_uppercase()) && word != "has" {
                kvfuse::codec::Chain::check_text(word).unwrap_or_else(|e| panic!("{word}: {e}"));
                found += 1;
            }
        }
    }
    assert!(found > 10, "{found}");
}

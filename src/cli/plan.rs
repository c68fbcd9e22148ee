//! experiments/NAME.toml: the steps of one figure, each a table of a command's options.

use super::Cli;
use crate::error::{Error, Result};
use clap::{ArgAction, CommandFactory};
use std::ops::Range;
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};

/// Steps in the order they run; a table of this name holds the options of the command of this name.
pub const STEPS: [&str; 7] = ["dump", "train", "calibrate", "stats", "sweep", "compare", "simulate"];
/// Tables of this name, in a list, hold options of `dump`: what `train` is given.
const TRAINING: &str = "training";
/// What `kvfuse run` fills in itself.
const FILLED: [&str; 8] = ["model", "out", "dump", "dumps", "stats", "against", "config", "json"];

/// One experiment.
#[derive(Debug)]
pub struct Plan {
    path: PathBuf,
    pub title: String,
    /// It is run once with each.
    pub models: Vec<String>,
    steps: Vec<Step>,
    /// Dumps to train on.
    training: Vec<Step>,
}

/// Options of one command.
#[derive(Debug, Clone)]
struct Step {
    command: &'static str,
    settings: Vec<Setting>,
}

#[derive(Debug, Clone)]
struct Setting {
    key: String,
    value: String,
    line: usize,
}

/// Reads the text of a plan.
struct Reader<'a> {
    path: &'a Path,
    text: &'a str,
}

impl Plan {
    /// Reads and checks a file: every table is a step's, every key one of its command's options. With `quick`, what its
    /// table `quick` holds takes the place of what is above it.
    pub fn read(path: &Path, quick: bool) -> Result<Self> {
        let text = crate::files::read_text(path)?;
        let reader = Reader { path, text: &text };
        let table = DeTable::parse(&text).map_err(|e| {
            let span = e.span().unwrap_or(0..0);
            reader.fault(span, e.message().replace('\n', " "))
        })?;
        let empty = || Plan {
            path: path.to_owned(),
            title: String::new(),
            models: Vec::new(),
            steps: Vec::new(),
            training: Vec::new(),
        };
        let (mut plan, mut small) = (empty(), empty());
        for (key, value) in table.get_ref() {
            match (&key.get_ref()[..], value.get_ref()) {
                ("title", DeValue::String(title)) => plan.title = title.to_string(),
                ("quick", DeValue::Table(table)) => {
                    for (key, value) in table {
                        reader.entry(&mut small, key.get_ref(), key.span(), value.get_ref(), value.span())?;
                    }
                }
                (name, of) => reader.entry(&mut plan, name, key.span(), of, value.span())?,
            }
        }
        for (needed, missing) in [
            ("title", plan.title.is_empty()),
            ("models", plan.models.is_empty()),
            ("[dump]", plan.step("dump").is_none()),
        ] {
            if missing {
                return Err(Error::file(path, format!("has no {needed}; see experiments/ for examples")));
            }
        }
        if quick {
            plan.overlay(small);
        }
        if plan.has("simulate") && !plan.bounds() && !plan.has("stats") {
            return Err(Error::file(
                path,
                "[simulate] needs statistics: add a [stats] table, if only an empty one (or a method, for the bound)",
            ));
        }
        if plan.has("train") == plan.training.is_empty() {
            return Err(Error::file(path, "[train] needs [[training]] tables, and they need [train]"));
        }
        Ok(plan)
    }

    fn step(&self, command: &str) -> Option<&Step> {
        self.steps.iter().find(|s| s.command == command)
    }

    pub fn has(&self, command: &str) -> bool {
        self.step(command).is_some()
    }

    /// Whether the table `simulate` is of the Gaussian bound: then it has chains.
    pub fn bounds(&self) -> bool {
        self.step("simulate").is_some_and(|s| s.settings.iter().any(|t| t.key == "method"))
    }

    /// All that a codec depends on, as text: the dumps it is trained on and how.
    pub fn trained_on(&self) -> String {
        let own = self.step("train").into_iter();
        let settings = self.training.iter().chain(own).map(|s| {
            // Codecs that lack a part are files of their own.
            let own = s.settings.iter().filter(|s| s.key != "without");
            own.map(|s| format!("{}={}\n", s.key, s.value)).collect::<String>() + "\n"
        });
        settings.collect()
    }

    /// Takes everything that `small` has.
    fn overlay(&mut self, small: Plan) {
        if !small.models.is_empty() {
            self.models = small.models;
        }
        if !small.training.is_empty() {
            self.training = small.training;
        }
        for step in small.steps {
            match self.steps.iter_mut().find(|s| s.command == step.command) {
                Some(own) => {
                    own.settings.retain(|s| step.settings.iter().all(|t| t.key != s.key));
                    own.settings.extend(step.settings);
                }
                None => self.steps.push(step),
            }
        }
    }

    /// The command line of a step: its options, after those that are `filled` in. `{name}` in a value stands for what
    /// `names` says.
    pub fn command(
        &self,
        command: &str,
        filled: &[String],
        names: &[(String, String)],
    ) -> Result<Vec<String>> {
        self.line(command, self.step(command).map_or(&[][..], |s| &s.settings), filled, names)
    }

    /// The command lines of the dumps to train on.
    pub fn training(&self, filled: &[String], names: &[(String, String)]) -> Result<Vec<Vec<String>>> {
        self.training.iter().map(|step| self.line(step.command, &step.settings, filled, names)).collect()
    }

    fn line(
        &self,
        command: &str,
        settings: &[Setting],
        filled: &[String],
        names: &[(String, String)],
    ) -> Result<Vec<String>> {
        let mut line = vec!["kvfuse".to_owned(), command.to_owned()];
        line.extend_from_slice(filled);
        for setting in settings {
            let mut value = setting.value.clone();
            for (name, meaning) in names {
                value = value.replace(&format!("{{{name}}}"), meaning);
            }
            if let Some((_, rest)) = value.split_once('{')
                && let Some((name, _)) = rest.split_once('}')
            {
                let problem =
                    format!("{}: {{{name}}} stands for nothing; pass --define {name}=...", setting.key);
                return Err(self.fault(setting, problem));
            }
            let option = setting.key.replace('_', "-");
            match (is_flag(command, &option), &value[..]) {
                (true, "true") => line.push(format!("--{option}")),
                (true, _) => {}
                (false, _) => line.push(format!("--{option}={value}")),
            }
        }
        Ok(line)
    }

    /// A command line's error, at the line of the setting it speaks of.
    pub fn usage(&self, command: &str, message: &str) -> Error {
        let settings = self.step(command).map_or(&[][..], |s| &s.settings);
        let named = settings.iter().find(|s| message.contains(&format!("--{}", s.key.replace('_', "-"))));
        match named {
            Some(setting) => self.fault(setting, message.to_owned()),
            None => Error::file(&self.path, format!("[{command}]: {message}")),
        }
    }

    fn fault(&self, setting: &Setting, problem: String) -> Error {
        Error::file(&self.path, format!("line {}: {problem}", setting.line))
    }
}

impl Reader<'_> {
    fn line(&self, span: Range<usize>) -> usize {
        self.text[..span.start.min(self.text.len())].matches('\n').count() + 1
    }

    fn fault(&self, span: Range<usize>, problem: impl Into<String>) -> Error {
        Error::file(self.path, format!("line {}: {}", self.line(span), problem.into()))
    }

    /// `models`, or the table of a step.
    fn entry(
        &self,
        plan: &mut Plan,
        name: &str,
        at: Range<usize>,
        value: &DeValue,
        span: Range<usize>,
    ) -> Result<()> {
        let command = STEPS.into_iter().find(|s| *s == name);
        match (name, command, value) {
            ("models", _, DeValue::Array(models)) => {
                for model in models {
                    let name = model.get_ref().as_str();
                    let name =
                        name.ok_or_else(|| self.fault(span.clone(), "models: write a list of names"))?;
                    plan.models.push(name.to_owned());
                }
            }
            (TRAINING, _, DeValue::Array(tables)) => {
                for table in tables {
                    let DeValue::Table(own) = table.get_ref() else {
                        return Err(self.fault(table.span(), "training: write [[training]] tables"));
                    };
                    let settings = self.settings("dump", own)?;
                    plan.training.push(Step { command: "dump", settings });
                }
            }
            (_, Some(command), DeValue::Table(table)) => {
                let settings = self.settings(command, table)?;
                plan.steps.push(Step { command, settings });
            }
            _ => {
                let problem = format!(
                    "unknown or misplaced '{name}'; there are title, models, quick, [[training]] and the tables {}",
                    STEPS.join(", ")
                );
                return Err(self.fault(at, problem));
            }
        }
        Ok(())
    }

    /// Options of a command, as a table holds them.
    fn settings(&self, command: &str, table: &DeTable) -> Result<Vec<Setting>> {
        let mut settings = Vec::new();
        for (key, value) in table {
            let name = key.get_ref();
            if !options(command).any(|o| o == name.replace('_', "-")) {
                let mut known: Vec<String> = options(command).map(|o| o.replace('-', "_")).collect();
                known.sort();
                let problem = format!("unknown key '{name}' in [{command}]; there are {}", known.join(", "));
                return Err(self.fault(key.span(), problem));
            }
            let text = text(value.get_ref()).ok_or_else(|| {
                self.fault(value.span(), format!("{name}: write a number, a text, true, false or a list"))
            })?;
            settings.push(Setting { key: name.to_string(), value: text, line: self.line(key.span()) });
        }
        Ok(settings)
    }
}

/// Long names of a command's options that a plan may set.
fn options(command: &str) -> impl Iterator<Item = String> {
    let cli = Cli::command();
    let names: Vec<String> = cli
        .find_subcommand(command)
        .map_or(Vec::new(), |c| c.get_arguments().filter_map(|a| a.get_long()).map(str::to_owned).collect());
    names.into_iter().filter(|n| !FILLED.contains(&&n[..]) && n != "help")
}

/// Whether an option takes no value.
fn is_flag(command: &str, option: &str) -> bool {
    let cli = Cli::command();
    let argument =
        cli.find_subcommand(command).and_then(|c| c.get_arguments().find(|a| a.get_long() == Some(option)));
    argument.is_some_and(|a| matches!(a.get_action(), ArgAction::SetTrue))
}

/// A value as the command line takes it; lists are joined by commas.
fn text(value: &DeValue) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) => Some(number.as_str().to_owned()),
        DeValue::Float(number) => Some(number.as_str().to_owned()),
        DeValue::Boolean(flag) => Some(flag.to_string()),
        DeValue::Array(values) => {
            let texts: Option<Vec<String>> = values.iter().map(|v| text(v.get_ref())).collect();
            texts.map(|t| t.join(","))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::IoAt;
    use std::fs;

    const GOOD: &str = "title = \"t\"\nmodels = [\"a\", \"b\"]\n[dump]\ndata = \"squad:{xquad}\"\nrequests = 64\n\n\
        [sweep]\nmethod = [\"none\", \"bff\"]\nbatch = [4, 8]\n[quick]\nmodels = [\"a\"]\n[quick.dump]\nrequests = 8\n";

    fn read(text: &str, quick: bool) -> Result<Plan> {
        let dir = tempfile::tempdir().map_err(|e| Error::argument(e.to_string()))?;
        let path = dir.path().join("x.toml");
        fs::write(&path, text).at(&path)?;
        Plan::read(&path, quick)
    }

    #[test]
    fn tables_become_command_lines() {
        let names = [("xquad".to_owned(), "f.json".to_owned())];
        let plan = read(GOOD, false).unwrap();
        assert_eq!(plan.models, ["a", "b"]);
        let line = plan.command("dump", &["--model=a".to_owned()], &names).unwrap();
        assert_eq!(line, ["kvfuse", "dump", "--model=a", "--data=squad:f.json", "--requests=64"]);
        let line = plan.command("sweep", &[], &names).unwrap();
        assert_eq!(line[2..], ["--batch=4,8", "--method=none,bff"]);
        let quick = read(GOOD, true).unwrap();
        assert_eq!(quick.models, ["a"]);
        assert_eq!(quick.command("dump", &[], &names).unwrap()[2..], ["--data=squad:f.json", "--requests=8"]);
        let error = plan.command("dump", &[], &[]).unwrap_err().to_string();
        assert!(error.contains("line 4: data: {xquad} stands for nothing"), "{error}");
    }

    #[test]
    fn faults_are_named_by_line() {
        for (from, to, line, words) in [
            ("requests = 64", "reqests = 64", 5, "unknown key 'reqests' in [dump]"),
            ("requests = 64", "model = \"x\"", 5, "unknown key 'model'"),
            ("[sweep]", "[swep]", 7, "'swep'"),
            ("requests = 64", "requests = ", 5, ""),
            ("requests = 8", "requests = 1979-05-27", 13, "requests: write a number"),
        ] {
            let error = read(&GOOD.replacen(from, to, 1), false).unwrap_err().to_string();
            assert!(error.contains(&format!("line {line}: ")) && error.contains(words), "{error}");
        }
        assert!(
            read("title = \"t\"\nmodels = [\"a\"]", false).unwrap_err().to_string().contains("no [dump]")
        );
    }

    /// Every committed experiment parses, at both sizes, to commands that exist.
    #[test]
    fn all_experiments_are_sound() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("experiments");
        let justfile = fs::read_to_string(folder.with_file_name("Justfile")).unwrap();
        let mut seen = 0;
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let names = ["xquad", "out", "root", "model", "codec"].map(|n| (n.to_owned(), "x".to_owned()));
            for quick in [false, true] {
                let plan = Plan::read(&path, quick).unwrap();
                for step in &plan.steps {
                    let filled: &[String] = match step.command {
                        "calibrate" | "stats" | "compare" => &["x".to_owned()],
                        "train" => &["x".to_owned(), "--out=x".to_owned()],
                        "simulate" if plan.bounds() => &["--bound=x".to_owned()],
                        "simulate" => &["--stats=x".to_owned()],
                        _ => &[],
                    };
                    let line = plan.command(step.command, filled, &names).unwrap();
                    if let Err(e) = clap::Parser::try_parse_from(&line).map(|_: Cli| ()) {
                        panic!("{}: {e}", path.display());
                    }
                }
                for line in plan.training(&[], &names).unwrap() {
                    clap::Parser::try_parse_from(&line).map(|_: Cli| ()).unwrap();
                }
                assert!(quick || !plan.models.is_empty());
            }
            let name = path.file_stem().unwrap().to_str().unwrap();
            assert!(justfile.contains(&format!("fig-{name} ")), "{name} has no target in the Justfile");
            seen += 1;
        }
        assert!(seen > 10);
    }
}

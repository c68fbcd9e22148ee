//! Every method by name. A method is a struct whose fields are its options: their names, defaults and help are those of `--method`, of
//! `kvfuse methods` and of the columns of sweep.csv. To add one: its file, and its row in its
//! folder's list.

use super::chain::Stage;
use super::evict;
use super::external::External;
use super::fusion;
use super::joint::Joint;
use super::kvtc::Kvtc;
use super::lowrank::LowRank;
use super::minicache::MiniCache;
use super::prefix::Prefix;
use super::quantize;
use super::random::Random;
use super::spec::{StageText, bad, nearest};
use super::{Codec, Role, Unfused};
use crate::error::{Error, Result};
use clap::{Args, Command, FromArgMatches, ValueHint};
use serde::Serialize;
use serde_json::{Map, Value};
use std::fmt::Display;
use std::ops::{Bound, RangeBounds};
use std::str::FromStr;
use std::sync::Arc;

/// A way of shrinking caches, with its options as fields. Serialised with names as on the command line; what is not set
/// is null.
pub trait Method: Args + FromArgMatches + Serialize + Clone {
    const NAME: &'static str;
    /// One line, then what else is to be said.
    const ABOUT: &'static str;
    /// Where it is from.
    const PAPER: &'static str;
    /// Options along which its curve is drawn: rows that differ in these alone are one series.
    const DIALS: &'static [&'static str] = &[];
    /// The option that is turned to meet a KL.
    const SEARCH: Option<Search> = None;
    /// What it does to caches.
    const ROLE: Role;
    /// Whether what is read back equals what was stored.
    const LOSSLESS: bool = false;
    /// What a text that turns no dial means.
    const GRID: Option<(&'static str, &'static str)> = None;

    /// As it is written: options that only repeat what follows from the others are taken out.
    fn normal(self) -> Self {
        self
    }

    /// What it comes to with all defaults filled in, for columns.
    fn effective(&self) -> Result<Value> {
        serde_json::to_value(self).map_err(|e| Error::argument(e.to_string()))
    }

    fn codec(&self) -> Result<Arc<dyn Codec>>;
}

/// Reads a number of an option, called `what` in errors, that lies between two bounds.
pub fn number<T>(
    what: &'static str,
    least: Bound<T>,
    most: Bound<T>,
) -> impl Fn(&str) -> std::result::Result<T, String> + Clone
where
    T: FromStr + PartialOrd + Display + Copy,
{
    move |text| match text.parse::<T>() {
        Ok(number) if (least, most).contains(&number) => Ok(number),
        _ => Err(match (least, most) {
            (Bound::Included(least), Bound::Included(most)) => format!("{what} is from {least} to {most}"),
            (Bound::Excluded(least), Bound::Included(most)) => {
                format!("{what} is above {least} and at most {most}")
            }
            (Bound::Excluded(least), Bound::Excluded(most)) => {
                format!("{what} is above {least} and below {most}")
            }
            _ => format!("{what} lies outside of its range"),
        }),
    }
}

/// Values of an option from the finest to the coarsest.
#[derive(Debug, Clone, Copy)]
pub struct Search {
    pub option: &'static str,
    pub fine: f64,
    pub coarse: f64,
    pub scale: Scale,
}

/// How values lie between two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    Linear,
    Logarithmic,
    /// Whole numbers.
    Whole,
}

impl Search {
    /// The value at a share of the way.
    pub fn at(&self, share: f64) -> f64 {
        match self.scale {
            Scale::Linear => self.fine + share * (self.coarse - self.fine),
            Scale::Logarithmic => self.fine * (self.coarse / self.fine).powf(share),
            Scale::Whole => (self.fine + share * (self.coarse - self.fine)).round(),
        }
    }
}

/// A row of the registry.
pub struct Entry {
    pub name: &'static str,
    pub about: &'static str,
    pub paper: &'static str,
    pub dials: &'static [&'static str],
    pub lossless: bool,
    /// What it does to caches.
    pub role: Role,
    pub grid: Option<(&'static str, &'static str)>,
    pub search: Option<Search>,
    command: fn() -> Command,
    build: fn(&Command, &[String]) -> std::result::Result<Stage, Problem>,
}

/// What is wrong with a stage's options: clap says it of a text, the method of what it means.
enum Problem {
    Text(Box<clap::Error>),
    Meaning(Error),
}

/// The methods, folder by folder, in the order in which `kvfuse methods` lists them.
static FOLDERS: [&[Entry]; 6] = [
    &[entry::<Unfused>(), entry::<Prefix>()],
    fusion::METHODS,
    &[entry::<Random>()],
    evict::METHODS,
    quantize::METHODS,
    &[entry::<LowRank>(), entry::<MiniCache>(), entry::<Kvtc>(), entry::<Joint>(), entry::<External>()],
];

/// All methods.
pub fn methods() -> impl Iterator<Item = &'static Entry> + Clone {
    FOLDERS.iter().copied().flatten()
}

/// A method's row.
pub(super) const fn entry<M: Method>() -> Entry {
    Entry {
        name: M::NAME,
        about: M::ABOUT,
        paper: M::PAPER,
        dials: M::DIALS,
        lossless: M::LOSSLESS,
        role: M::ROLE,
        grid: M::GRID,
        search: M::SEARCH,
        command: || M::augment_args(Command::new(M::NAME).no_binary_name(true).disable_help_flag(true)),
        build: |command, arguments| {
            let text = |e| Problem::Text(Box::new(e));
            let matches = command.clone().try_get_matches_from(arguments).map_err(text)?;
            let method = M::from_arg_matches(&matches).map_err(text)?.normal();
            let usual = command.clone().try_get_matches_from::<_, String>([]).map_err(text)?;
            let usual = M::from_arg_matches(&usual).map_err(text)?.normal();
            stage(method, &usual).map_err(Problem::Meaning)
        },
    }
}

fn stage<M: Method>(method: M, usual: &M) -> Result<Stage> {
    let object = |value: Value| match value {
        Value::Object(fields) => fields,
        _ => Map::new(),
    };
    let fields = |m: &M| serde_json::to_value(m).map(object).map_err(|e| Error::argument(e.to_string()));
    let (own, usual) = (fields(&method)?, fields(usual)?);
    let set: Vec<(String, Value)> =
        own.into_iter().filter(|(name, value)| usual.get(name) != Some(value) && !value.is_null()).collect();
    Ok(Stage {
        name: M::NAME,
        set,
        effective: object(method.effective()?),
        role: M::ROLE,
        codec: method.codec()?,
    })
}

/// An option of a method, for people.
pub struct OptionHelp {
    pub name: String,
    pub default: Option<String>,
    pub help: String,
    /// Values it may have, if these are few.
    pub values: Vec<String>,
}

impl Entry {
    /// Options that name files.
    pub fn files(&self) -> Vec<String> {
        let command = (self.command)();
        let named = command.get_arguments().filter(|a| a.get_value_hint() == ValueHint::FilePath);
        named.filter_map(|a| a.get_long().map(str::to_owned)).collect()
    }

    /// Whether it needs a file of `kvfuse train`.
    pub fn trained(&self) -> bool {
        self.files().iter().any(|option| option == "codec")
    }

    pub fn options(&self) -> Vec<OptionHelp> {
        let option = |a: &clap::Arg| OptionHelp {
            name: a.get_long().unwrap_or_default().to_owned(),
            default: a.get_default_values().first().map(|v| v.to_string_lossy().into_owned()),
            help: a.get_help().map(ToString::to_string).unwrap_or_default(),
            values: a.get_possible_values().iter().map(|v| v.get_name().to_owned()).collect(),
        };
        (self.command)().get_arguments().map(option).collect()
    }
}

/// The method of a name.
pub fn method(name: &str) -> Option<&'static Entry> {
    methods().find(|m| m.name == name)
}

/// One value of an option, and where the option stands.
#[derive(Clone)]
pub(super) struct Chosen {
    pub name: String,
    pub at: usize,
    pub value: String,
}

/// Whether a chain in normal form is a control: all its methods are lossless.
pub fn is_control(chain: &str) -> bool {
    super::spec::names(chain).iter().all(|name| method(name).is_some_and(|m| m.lossless))
}

/// A stage of a chain with one value for each of its options. `text` is what errors show.
pub(super) fn build(text: &str, written: &StageText, values: &[Chosen]) -> Result<Stage> {
    let entry = known(text, written)?;
    let command = (entry.command)();
    let names: Vec<String> =
        command.get_arguments().filter_map(|a| a.get_long().map(str::to_owned)).collect();
    let mut arguments = Vec::new();
    for Chosen { name, at, value } in values {
        if !names.contains(name) {
            let all = names.iter().map(String::as_str);
            let hint = match (nearest(name, all), names.is_empty()) {
                (Some(near), _) => format!("did you mean {near}?"),
                (None, true) => "it has none".to_owned(),
                (None, false) => format!("it has {}", names.join(", ")),
            };
            return Err(bad(text, *at, format!("{} has no option '{name}'; {hint}", entry.name)));
        }
        arguments.push(format!("--{name}={value}"));
    }
    (entry.build)(&command, &arguments).map_err(|problem| match problem {
        Problem::Text(error) => {
            // The option that clap speaks of.
            let shown = error.to_string();
            let about = values.iter().find(|c| shown.contains(&format!("--{}", c.name)));
            let first = shown.lines().next().unwrap_or_default();
            // clap writes --name <VALUE>; a chain writes name.
            let mut words = first.trim_start_matches("error: ").replace("--", "");
            // The last ones: the value, which stands before, may hold either mark.
            if let Some(from) = words.rfind(" <")
                && let Some(length) = words[from..].find('>')
            {
                words.replace_range(from..=from + length, "");
            }
            if let Some(list) = shown.lines().find_map(|l| l.trim().strip_prefix("[possible values: ")) {
                words += &format!("; it is one of {}", list.trim_end_matches(']'));
            }
            bad(text, about.map_or(written.at, |c| c.at), words)
        }
        Problem::Meaning(Error::Argument(problem)) => bad(text, written.at, problem),
        Problem::Meaning(other) => other,
    })
}

/// The method that a stage names.
pub(super) fn known(text: &str, written: &StageText) -> Result<&'static Entry> {
    method(&written.name).ok_or_else(|| {
        let names = methods().map(|m| m.name);
        let hint = nearest(&written.name, names.clone()).map_or_else(
            || format!("there are {}", names.collect::<Vec<_>>().join(", ")),
            |near| format!("did you mean {near}?"),
        );
        bad(text, written.at, format!("no method is called '{}'; {hint}", written.name))
    })
}

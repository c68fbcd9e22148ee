//! Chains: codecs one after the other, each encoding what the one before left. A chain is a codec itself.

use super::evict::Needs;
use super::fusion::{ChunkFusion, Fusion};
use super::joint::Bound;
use super::registry::{Chosen, Search, build, known, method};
use super::spec::{ChainText, bad, parse};
use super::{CacheBatch, Codec, Coverage, Memo, Role};
use crate::error::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// A method with its options.
#[derive(Clone)]
pub struct Stage {
    pub name: &'static str,
    /// Options that differ from their defaults.
    pub set: Vec<(String, Value)>,
    /// All options, defaults filled in, and what else a method has to say of itself.
    pub effective: Map<String, Value>,
    pub role: Role,
    pub codec: Arc<dyn Codec>,
}

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "Chain({})", self.name())
    }
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{}", self.name)?;
        for (i, (name, value)) in self.set.iter().enumerate() {
            let mark = if i == 0 { ':' } else { ',' };
            match value {
                Value::String(text) => write!(f, "{mark}{name}={text}")?,
                // 1, not 1.0.
                Value::Number(number) => write!(f, "{mark}{name}={}", number.as_f64().unwrap_or(f64::NAN))?,
                other => write!(f, "{mark}{name}={other}")?,
            }
        }
        Ok(())
    }
}

impl Stage {
    /// The stage that reads its pages, with this path in place of the name of its trained file, as the last option; `None` if it
    /// has no option that names one.
    pub fn with_file(&self, path: &Path) -> Option<String> {
        let option = method(self.name)?.files().into_iter().next()?;
        let set = self.set.iter().filter(|(name, _)| *name != option).cloned().collect();
        let others = Stage { set, ..self.clone() }.to_string();
        let mark = if others.contains(':') { ',' } else { ':' };
        Some(format!("{others}{mark}{option}={}", path.display()))
    }

    /// What [`Stage::with_file`] gave, with another path.
    pub fn moved(text: &str, path: &Path) -> Option<String> {
        let name = text.split(':').next()?;
        let option = format!("{}=", method(name)?.files().into_iter().next()?);
        let before = &text[..text.find(&option)?];
        Some(format!("{before}{option}{}", path.display()))
    }
}

/// What chains are written for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    /// Caches that are encoded, once.
    Caches,
    /// A server, whose pages are coded while they are read, and again, otherwise, when nobody reads them.
    Server,
}

/// Stages in the order in which they encode.
#[derive(Clone)]
pub struct Chain {
    stages: Vec<Stage>,
}

impl Chain {
    /// All chains that a text means: of alternatives, every combination; each chain once.
    ///
    /// # Errors
    /// Unknown methods, options and values, with a caret under the place; stages in an order that means nothing.
    pub fn parse(text: &str) -> Result<Vec<Chain>> {
        Chain::parse_for(text, Use::Caches)
    }

    /// The chains that a text means to a server, which may keep pages by one codec and cold ones by another.
    ///
    /// # Errors
    /// As for [`Chain::parse`].
    pub fn parse_served(text: &str) -> Result<Vec<Chain>> {
        Chain::parse_for(text, Use::Server)
    }

    fn parse_for(text: &str, of: Use) -> Result<Vec<Chain>> {
        let mut chains: Vec<Chain> = Vec::new();
        for written in parse(text)? {
            for chain in expand(text, written, of)? {
                if chains.iter().all(|c| c.name() != chain.name()) {
                    chains.push(chain);
                }
            }
        }
        Ok(chains)
    }

    /// Checks a text as far as that goes without the files that it names: an experiment may be about to write them anew.
    pub fn check_text(text: &str) -> Result<()> {
        for written in parse(text)? {
            let mut files = false;
            for stage in &written {
                let names: Vec<String> = known(text, stage)?.files();
                files |= stage.options.iter().any(|o| names.contains(&o.name));
            }
            if !files {
                expand(text, written, Use::Caches)?;
            }
        }
        Ok(())
    }

    /// One chain whose dials are not turned: a way of encoding whose thresholds are looked for.
    pub fn undialled(text: &str) -> Result<Chain> {
        for stage in parse(text)?.iter().flatten() {
            let entry = known(text, stage)?;
            if let Some(dial) = stage.options.iter().find(|o| entry.dials.contains(&&o.name[..])) {
                return Err(bad(text, dial.at, format!("{} is what is looked for; leave it out", dial.name)));
            }
        }
        let mut chains = Chain::parse(text)?;
        let choices = |c: &Chain| c.fusion().map(|f| *f.choices());
        if chains.iter().any(|c| choices(c).is_none() || choices(c) != choices(&chains[0])) {
            return Err(bad(text, 0, "one chain of one fusion is needed, without alternatives"));
        }
        Ok(chains.swap_remove(0))
    }

    /// The control without any encoding, and that of exact prefix sharing.
    pub fn controls(within_tenant: bool) -> Result<Vec<Chain>> {
        Chain::parse(if within_tenant { "none,prefix:within-tenant=true" } else { "none,prefix" })
    }

    /// The chain in normal form: stages with what differs from their defaults.
    pub fn name(&self) -> String {
        self.stages.iter().map(Stage::to_string).collect::<Vec<_>>().join("+")
    }

    /// All options of all stages, defaults filled in, as `stage.option`.
    pub fn options(&self) -> BTreeMap<String, Value> {
        let of = |stage: &Stage| {
            let name = stage.name;
            let set = stage.effective.iter().filter(|(_, value)| !value.is_null());
            set.map(|(option, value)| (format!("{name}.{option}"), value.clone())).collect::<Vec<_>>()
        };
        self.stages.iter().flat_map(of).collect()
    }

    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// What its last stage does.
    pub fn role(&self) -> Role {
        self.stages.last().map_or(Role::Nothing, |s| s.role)
    }

    /// Whether it leaves caches as they are.
    pub fn is_unfused(&self) -> bool {
        self.stages.iter().all(|s| s.role == Role::Nothing)
    }

    /// Whether it never shares between tenants.
    pub fn within_tenant(&self) -> bool {
        let mut sharing = self.stages.iter().filter_map(|s| s.codec.within_tenant()).peekable();
        sharing.peek().is_some() && sharing.all(|within| within)
    }

    /// Its fusion, if it is fusion alone or of what is left by exact sharing.
    pub fn fusion(&self) -> Option<&Fusion> {
        self.stages.iter().find_map(|s| s.codec.fusion())
    }

    /// The stage that prefills anew, chunk by chunk; always the first.
    pub fn chunks(&self) -> Option<&ChunkFusion> {
        self.stages.first().and_then(|s| s.codec.chunks())
    }

    /// Tokens a block that it must be used with: a calibration is for one size.
    pub fn block_size(&self) -> Option<usize> {
        self.fusion().and_then(|f| f.rule().thresholds()).map(|t| t.block_size)
    }

    /// Encodes caches that the first stage has prefilled itself.
    pub fn encode_rest(&self, batch: &mut CacheBatch) -> Result<()> {
        self.stages[1..].iter().try_for_each(|s| s.codec.encode(batch, &Memo::default()))
    }

    fn check(self, text: &str, written: &ChainText, of: Use) -> Result<Self> {
        let roles: Vec<Role> = self.stages.iter().map(|s| s.role).collect();
        for i in 1..roles.len() {
            let (name, before) = (self.stages[i].name, self.stages[i - 1].name);
            let problem = match (roles[i - 1], roles[i]) {
                (Role::Nothing | Role::Whole, _) => format!("{before} stands alone"),
                (_, Role::Nothing | Role::Whole) => format!("{name} stands alone"),
                (_, _) if self.stages[i].codec.chunks().is_some() => {
                    format!("{name} prefills anew and must be the first stage")
                }
                (Role::Code, Role::Code)
                    if of == Use::Server && roles[..i - 1].last() != Some(&Role::Code) =>
                {
                    continue;
                }
                (Role::Code, Role::Code) if of == Use::Caches => {
                    format!(
                        "{name} cannot follow {before}: caches are coded once; a server keeps pages in {before} and cold ones in {name}"
                    )
                }
                (a, b) if b <= a => {
                    format!(
                        "{name} cannot follow {before}: sharing comes first, then fusion or eviction, then coding"
                    )
                }
                _ if !self.stages[i].codec.takes_changed()
                    && roles[..i].iter().any(|r| matches!(r, Role::Fuse | Role::Evict)) =>
                {
                    format!("{name} takes blocks as prefill left them; it cannot follow {before}")
                }
                _ => continue,
            };
            return Err(bad(text, written[i].at, problem));
        }
        let sharing: Vec<bool> = self.stages.iter().filter_map(|s| s.codec.within_tenant()).collect();
        if sharing.windows(2).any(|w| w[0] != w[1]) {
            let problem = "within-tenant must be the same in all stages of a chain";
            return Err(bad(text, written[0].at, problem));
        }
        Ok(self)
    }
}

/// Every combination of a chain's alternatives, options in the order written, the first stage's turning slowest.
fn expand(text: &str, written: ChainText, of: Use) -> Result<Vec<Chain>> {
    let mut all: Vec<Vec<Stage>> = vec![Vec::new()];
    for stage in &written {
        let entry = known(text, stage)?;
        let mut choices: Vec<Vec<Chosen>> = vec![Vec::new()];
        let mut add = |name: &str, at: usize, values: &[String]| {
            let chosen = |value: &String| Chosen { name: name.to_owned(), at, value: value.clone() };
            choices = choices
                .iter()
                .flat_map(|choice| {
                    values.iter().map(|v| choice.iter().cloned().chain([chosen(v)]).collect::<Vec<_>>())
                })
                .collect();
        };
        for (i, option) in stage.options.iter().enumerate() {
            if stage.options[..i].iter().any(|o| o.name == option.name) {
                return Err(bad(
                    text,
                    option.at,
                    format!("{} is given twice; alternatives are written a|b", option.name),
                ));
            }
        }
        // Dials turn fastest: rows of one series stand together.
        let (dials, others): (Vec<_>, Vec<_>) =
            stage.options.iter().partition(|o| entry.dials.contains(&&o.name[..]));
        others.iter().for_each(|o| add(&o.name, o.at, &o.values));
        match (dials.is_empty(), entry.grid) {
            (true, Some((name, values))) => {
                let grid = parse(&format!("x:{name}={values}"))?;
                add(name, stage.at, &grid[0][0].options[0].values);
            }
            _ => dials.iter().for_each(|o| add(&o.name, o.at, &o.values)),
        }
        let mut built = Vec::with_capacity(choices.len());
        for choice in &choices {
            built.push(build(text, stage, choice)?);
        }
        all = all
            .iter()
            .flat_map(|before| {
                built.iter().map(|stage| before.iter().cloned().chain([stage.clone()]).collect::<Vec<_>>())
            })
            .collect();
    }
    all.into_iter().map(|stages| Chain { stages }.check(text, &written, of)).collect()
}

/// One chain with a dial that can be turned from fine to coarse: that of its last stage that has one.
pub struct Turnable {
    text: String,
    /// Where the option goes, and what comes before its name.
    at: usize,
    mark: char,
    search: Search,
}

impl Turnable {
    /// # Errors
    /// Several chains; a chain without a dial, or whose dial is turned; one that prefills anew.
    pub fn of(text: &str) -> Result<Self> {
        let written = match &parse(text)?[..] {
            [one] => one.clone(),
            _ => return Err(bad(text, 0, "one chain is needed")),
        };
        let entries: Vec<_> = written.iter().map(|s| known(text, s)).collect::<Result<_>>()?;
        let found = entries.iter().enumerate().rev().find_map(|(i, e)| Some((i, e.search?)));
        let (i, search) =
            found.ok_or_else(|| bad(text, 0, "nothing in it can be turned from fine to coarse"))?;
        if let Some(own) = written[i].options.iter().find(|o| entries[i].dials.contains(&&o.name[..])) {
            return Err(bad(text, own.at, format!("{} is what is looked for; leave it out", own.name)));
        }
        // A stage ends before the + of the next.
        let at = written.get(i + 1).map_or(text.len(), |next| next.at - 1);
        let mark = if written[i].options.is_empty() { ':' } else { ',' };
        let turnable = Turnable { text: text.to_owned(), at, mark, search };
        if turnable.chain(0.5)?.chunks().is_some() {
            return Err(bad(text, 0, "it prefills anew; sweep it"));
        }
        Ok(turnable)
    }

    /// The chain at a share of the way from fine to coarse.
    pub fn chain(&self, share: f64) -> Result<Chain> {
        let (before, after) = self.text.split_at(self.at);
        let value = self.search.at(share);
        // Four digits are enough to meet a bound, and can be read.
        let digits = (3 - value.abs().log10().floor() as i32).clamp(0, 12) as usize;
        let value: f64 = format!("{value:.digits$}").parse().unwrap_or(value);
        let text = format!("{before}{}{}={value}{after}", self.mark, self.search.option);
        let mut chains = Chain::parse(&text)?;
        if chains.len() != 1 {
            return Err(bad(&self.text, 0, "one chain is needed, without alternatives"));
        }
        Ok(chains.swap_remove(0))
    }
}

impl Codec for Chain {
    fn within_tenant(&self) -> Option<bool> {
        Some(self.within_tenant())
    }

    fn needs(&self) -> Needs {
        self.stages.iter().map(|s| s.codec.needs()).fold(Needs::default(), Needs::and)
    }

    fn decode(&self, batch: &mut CacheBatch) -> Result<()> {
        match self.stages.last() {
            Some(stage) => stage.codec.decode(batch),
            None => Ok(()),
        }
    }

    fn bound(&self, batch: &mut CacheBatch) -> Result<Bound> {
        let Some((last, before)) = self.stages.split_last() else {
            return Err(Error::argument("an empty chain has no bound"));
        };
        encode(before, batch, &Memo::default())?;
        last.codec.bound(batch)
    }

    /// Of its fusion, if it has one: the paper counts these layers.
    fn coverage(&self, layers: usize) -> Coverage {
        let fusing = self.stages.iter().find(|s| s.role == Role::Fuse);
        let stage = fusing.or(self.stages.last());
        stage.map_or(Coverage::of(0..0), |s| s.codec.coverage(layers))
    }

    fn encode(&self, batch: &mut CacheBatch, memo: &Memo) -> Result<()> {
        encode(&self.stages, batch, memo)
    }
}

/// One stage after the other. What a stage has done is one more revision of the caches, with a memo of its own.
fn encode(stages: &[Stage], batch: &mut CacheBatch, memo: &Memo) -> Result<()> {
    let Some((first, rest)) = stages.split_first() else { return Ok(()) };
    first.codec.encode(batch, memo)?;
    if rest.is_empty() { Ok(()) } else { encode(rest, batch, &memo.after(&first.to_string())) }
}

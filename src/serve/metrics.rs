//! What a run of requests took, in the names of vLLM's `bench serve`.

use crate::stats::{mean, quantile};
use serde::Serialize;
use serde_json::{Map, Value};

/// One request as its client saw it, in seconds since the run began.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Served {
    pub arrival: f64,
    /// When each token of the answer came.
    pub tokens: Vec<f64>,
    /// When it ended, be it without a token.
    pub end: f64,
    pub input_tokens: usize,
    pub failed: bool,
}

impl Served {
    fn ttft(&self) -> f64 {
        self.tokens.first().unwrap_or(&self.end) - self.arrival
    }

    fn e2el(&self) -> f64 {
        self.end - self.arrival
    }

    /// Seconds a token after the first; none of an answer of one token.
    fn tpot(&self) -> Option<f64> {
        let n = self.tokens.len();
        (n > 1).then(|| (self.e2el() - self.ttft()) / (n - 1) as f64)
    }
}

/// Latencies below which a request counts as good, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Goal {
    pub ttft: Option<f64>,
    pub tpot: Option<f64>,
    pub e2el: Option<f64>,
}

impl Goal {
    /// Reads `ttft:200`, `tpot:50`, `e2el:2000`.
    ///
    /// # Errors
    /// Other names, and what is no number above 0.
    pub fn read(parts: &[String]) -> Result<Self, String> {
        let mut goal = Goal::default();
        for part in parts {
            let known = part.split_once(':').and_then(|(name, number)| {
                let number = number.parse().ok().filter(|x: &f64| *x > 0.0)?;
                let slot = match name {
                    "ttft" => &mut goal.ttft,
                    "tpot" => &mut goal.tpot,
                    "e2el" => &mut goal.e2el,
                    _ => return None,
                };
                *slot = Some(number);
                Some(())
            });
            known.ok_or_else(|| format!("'{part}': use ttft:MS, tpot:MS or e2el:MS"))?;
        }
        Ok(goal)
    }

    fn met(&self, served: &Served) -> bool {
        let below = |limit: Option<f64>, seconds: f64| limit.is_none_or(|l| 1e3 * seconds <= l);
        !served.failed
            && below(self.ttft, served.ttft())
            && below(self.tpot, served.tpot().unwrap_or(0.0))
            && below(self.e2el, served.e2el())
    }
}

/// All fields of a run that follow from its requests; `percentiles` of 0 to 100.
pub fn fields(served: &[Served], duration: f64, goal: Goal, percentiles: &[f64]) -> Map<String, Value> {
    let done: Vec<&Served> = served.iter().filter(|s| !s.failed).collect();
    let input: usize = done.iter().map(|s| s.input_tokens).sum();
    let output: usize = done.iter().map(|s| s.tokens.len()).sum();
    let good = done.iter().filter(|s| goal.met(s)).count();
    let mut out = Map::new();
    let mut put = |name: String, value: f64| {
        out.insert(name, Value::from(crate::stats::rounded(value)));
    };
    let per_second = |n: usize| n as f64 / duration;
    put("duration".into(), duration);
    put("completed".into(), done.len() as f64);
    put("failed".into(), (served.len() - done.len()) as f64);
    put("total_input_tokens".into(), input as f64);
    put("total_output_tokens".into(), output as f64);
    put("request_throughput".into(), per_second(done.len()));
    put("request_goodput".into(), per_second(good));
    put("output_throughput".into(), per_second(output));
    put("total_token_throughput".into(), per_second(input + output));
    let gaps = |s: &&Served| s.tokens.windows(2).map(|w| w[1] - w[0]).collect::<Vec<f64>>();
    let measured: [(&str, Vec<f64>); 4] = [
        ("ttft", done.iter().map(|s| s.ttft()).collect()),
        ("tpot", done.iter().filter_map(|s| s.tpot()).collect()),
        ("itl", done.iter().flat_map(gaps).collect()),
        ("e2el", done.iter().map(|s| s.e2el()).collect()),
    ];
    for (name, seconds) in measured {
        let ms: Vec<f64> = seconds.iter().map(|s| 1e3 * s).collect();
        let average = if ms.is_empty() { 0.0 } else { mean(&ms) };
        let variance = ms.iter().map(|x| (x - average).powi(2)).sum::<f64>() / ms.len().max(1) as f64;
        put(format!("mean_{name}_ms"), average);
        put(format!("median_{name}_ms"), quantile(&ms, 0.5).unwrap_or(0.0));
        put(format!("std_{name}_ms"), variance.sqrt());
        for p in percentiles {
            put(format!("p{p}_{name}_ms"), quantile(&ms, p / 100.0).unwrap_or(0.0));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn definitions_are_those_of_vllm() {
        let served = [
            Served { arrival: 1.0, tokens: vec![1.5, 1.7, 2.1], end: 2.1, input_tokens: 10, failed: false },
            Served { arrival: 0.0, tokens: vec![0.1], end: 0.1, input_tokens: 4, failed: false },
            Served { arrival: 0.0, end: 0.2, failed: true, ..Served::default() },
        ];
        let goal = Goal::read(&["ttft:200".to_owned()]).unwrap();
        let fields = fields(&served, 4.0, goal, &[95.0]);
        let is = |name: &str, value: f64| {
            assert!((fields[name].as_f64().unwrap() - value).abs() < 1e-6, "{name}: {}", fields[name]);
        };
        is("completed", 2.0);
        is("failed", 1.0);
        is("output_throughput", 1.0);
        is("total_token_throughput", 4.5);
        is("request_goodput", 0.25);
        is("mean_ttft_ms", 300.0);
        is("mean_tpot_ms", 300.0);
        is("mean_itl_ms", 300.0);
        is("p95_itl_ms", 400.0);
        is("mean_e2el_ms", 600.0);
        assert!(Goal::read(&["itl:3".to_owned()]).is_err());
    }
}

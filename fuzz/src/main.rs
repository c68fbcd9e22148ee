//! One libFuzzer binary for everything that kvfuse reads: `KVFUSE_FUZZ` names the target (docs/reliability.md). An input is a file, or one file
//! of a folder whose others are sound.
#![no_main]

use kvfuse::cli::Plan;
use kvfuse::codec::joint::book::Book;
use kvfuse::codec::{Chain, Codec, TrainedFile};
use kvfuse::dump::{Manifest, Shard};
use kvfuse::encoded::Encoded;
use kvfuse::model::Model;
use kvfuse::stats::read_stats;
use kvfuse::tables::Table;
use kvfuse::task::Draw;
use libfuzzer_sys::fuzz_target;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

struct Target {
    read: fn(&Path, &[u8]),
    /// Where inputs are written, on a file system in memory; sound files stand beside.
    folder: PathBuf,
}

/// Writes the input under a name and reads it in some way; what is refused is as good as what is read.
fn at(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, bytes).expect("the folder can be written");
    path
}

fn text(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

fn task(folder: &Path, kind: &str, bytes: &[u8]) {
    let path = at(folder, "data", bytes);
    let spec = format!("{kind}:{}", path.display());
    let draw = Draw::plain(&spec, 2, 1, 0);
    let _ = kvfuse::task::load(&draw, &|text| Ok(text.len() / 4));
}

fn target(name: &str) -> fn(&Path, &[u8]) {
    match name {
        "gguf" => |folder, bytes| {
            let _ = Model::open(&at(folder, "model.gguf", bytes));
        },
        "config" => |folder, bytes| {
            at(folder, "config.json", bytes);
            let _ = Model::open(folder);
        },
        "safetensors" => |folder, bytes| {
            at(folder, "model.safetensors", bytes);
            let _ = Model::open(folder);
        },
        "tokenizer" => |folder, bytes| {
            at(folder, "tokenizer.json", bytes);
            if let Ok(model) = Model::open(folder) {
                let _ = model.tokenizer.encode("a b\u{e9}\n  c").map(|ids| model.tokenizer.decode(&ids));
            }
        },
        "manifest" => |folder, bytes| {
            at(folder, "manifest.json", bytes);
            if let Ok(manifest) = Manifest::read(folder) {
                let _ = kvfuse::dump::inspect(folder);
                let _ = manifest.identity();
            }
        },
        "shard" => |folder, bytes| {
            let path = at(folder, "request-00000.safetensors", bytes);
            let Ok(manifest) = Manifest::read_unfinished(folder) else { return };
            if let Ok(shard) = Shard::open(&path, &manifest.model.config) {
                (0..shard.layers()).for_each(|n| drop(shard.layer(n)));
            }
        },
        "encoded" => |folder, bytes| {
            let _ = Encoded::read(&at(folder, "file.kv", bytes), Some(&folder.join("joint.safetensors")));
        },
        "joint" => |folder, bytes| {
            let _ = Book::read(&at(folder, "joint.safetensors", bytes));
        },
        "spec" => |_, bytes| {
            for chain in Chain::parse(&text(bytes)).into_iter().flatten() {
                assert!(
                    Chain::parse(&chain.name()).is_ok(),
                    "the normal form of {} can be read",
                    chain.name()
                );
                let _ = chain.coverage(4);
            }
        },
        "experiment" => |folder, bytes| {
            let path = at(folder, "experiment.toml", bytes);
            let _ = Plan::read(&path, false);
            let _ = Plan::read(&path, true);
        },
        "table" => |folder, bytes| {
            let path = at(folder, "sweep.csv", bytes);
            let _ = read_stats(&path);
            if let Ok(table) = Table::read(&path) {
                let _ = kvfuse::sweep::labelled(&table).map(|rows| kvfuse::sweep::series_labels(&rows));
            }
        },
        "squad" => |folder, bytes| task(folder, "squad", bytes),
        "longbench" => |folder, bytes| task(folder, "longbench", bytes),
        "ruler" => |folder, bytes| task(folder, "ruler", bytes),
        "prompts" => |folder, bytes| task(folder, "prompts", bytes),
        _ => panic!("KVFUSE_FUZZ names no target: {name}"),
    }
}

fn chosen() -> &'static Target {
    static CHOSEN: OnceLock<Target> = OnceLock::new();
    CHOSEN.get_or_init(|| {
        kvfuse::progress::silence();
        let name = std::env::var("KVFUSE_FUZZ").unwrap_or_default();
        let read = target(&name);
        let folder = Path::new("/dev/shm").join(format!("kvfuse-fuzz-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder in memory can be made");
        let sound = Path::new(env!("CARGO_MANIFEST_DIR")).join("sound").join(&name);
        for file in fs::read_dir(sound).into_iter().flatten().flatten() {
            fs::copy(file.path(), folder.join(file.file_name())).expect("a sound file can be copied");
        }
        Target { read, folder }
    })
}

fuzz_target!(|bytes: &[u8]| {
    let target = chosen();
    (target.read)(&target.folder, bytes);
});

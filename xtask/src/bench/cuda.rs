//! `cargo xtask bench cuda`: our work on a GPU, everybody else's, and the device's ceilings, in one sitting.

use super::rows::{Floor, Row, Unit};
use super::table::{Figures, Measured, print_head};
use super::worker::Worker;
use super::{Options, build, results_folder};
use crate::command::{output, program, root, works};
use crate::reference;
use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::Command;

/// The one to measure on, in our words and in PyTorch's.
const DEVICE: &str = "cuda:0";

/// What they do: carried along, for machines without our source tree.
const PEERS: &str = include_str!("../../../reference/bench_gpu.py");

const TENSORS: &[&str] = &["torch", "torch.compile", "torch.compile + graph"];
const TRAINERS: &[&str] = &["PEFT", "PEFT + compile", "PEFT + Liger", "PEFT + Liger + compile"];
const GENERATORS: &[&str] = &["transformers", "transformers + compile"];

pub(super) fn run(options: &Options) -> Result<()> {
    let mut crew = Crew::gather(options)?;
    let rows = crew.rows(options)?;
    let file = options.json.clone().unwrap_or_else(|| crew.folder.join("cuda.json"));
    let device = crew.try_ask("ours", "{}")?;
    println!("{}", device["device"].as_str().unwrap_or(DEVICE));
    println!("ceilings: {}", device["ceilings"]);
    print_head();
    let mut measured = Vec::new();
    for row in &rows {
        let figures = measure(row, options.quick, &mut crew);
        figures.print();
        measured.push(figures.json());
        let page = json!({"quick": options.quick, "machine": device, "rows": measured});
        // After each row: a run that is stopped leaves what it has.
        std::fs::write(&file, serde_json::to_string_pretty(&page)?)
            .with_context(|| file.display().to_string())?;
    }
    println!("\nratio: how many times ours is as fast; peak: ours as planned, theirs as allocated");
    println!("figures: {}", file.display());
    if options.quick {
        println!("--quick: this shows that every row works, and no more");
    }
    Ok(())
}

/// A row, round by round: ours, every peer; and again. Models of two workers may not fit at once, so that each
/// is made anew in each round: they have one.
fn measure<'r>(row: &'r Row, quick: bool, crew: &mut Crew) -> Measured<'r> {
    let (rounds, warmup, calls, seconds) = match (quick, row.is_model, row.unit) {
        (true, ..) => (1, 1, 1, 0.0),
        (false, false, _) => (3, 10, 20, 0.2),
        (false, true, Unit::Tokens(1.0)) => (1, 8, 248, 0.0),
        (false, true, _) => (1, 3, 10, 0.0),
    };
    let question = json!({
        "name": row.name, "row": row.work, "warmup": warmup, "calls": calls, "seconds": seconds,
    });
    let question = question.to_string();
    let (mut floor_seconds, mut binds) = (Vec::new(), None);
    let mut ours = Figures::default();
    let mut peers: Vec<Figures> = row.peers.iter().map(|_| Figures::default()).collect();
    for _ in 0..rounds {
        let answer = crew.ask("ours", &question, row.is_model);
        floor_seconds.extend(answer["floor_seconds"].as_f64());
        binds = answer["ceiling"].as_str().map(str::to_owned).or(binds);
        ours.add(&answer);
        for (peer, figures) in row.peers.iter().zip(&mut peers) {
            // What one round lacked, the next would lack, too.
            if figures.missing.is_none() {
                figures.add(&crew.ask(peer, &question, row.is_model));
            }
        }
    }
    Measured { row, ours, peers, floor_seconds, binds }
}

/// All who measure. They are started when first asked.
struct Crew {
    folder: PathBuf,
    bench: PathBuf,
    /// Or why there is none.
    python: Result<PathBuf>,
    workers: Vec<(String, Worker)>,
}

impl Crew {
    fn gather(options: &Options) -> Result<Crew> {
        if let Some(bench) = options.program.clone() {
            // No cargo is there to say where results go.
            let folder = std::path::absolute("metal-candle-bench")?;
            std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
            return Ok(Crew { folder, bench, python: own_python(), workers: Vec::new() });
        }
        if !works(program("nvcc").arg("--version")) {
            bail!(
                "a build for CUDA takes NVIDIA's toolkit: there is no nvcc in PATH (--program FILE takes one that was \
                 made elsewhere)"
            );
        }
        // In the profile of benches, however quick: Candle's kernels take long to build once more.
        let [bench] =
            build(false, &["--features", "metal-candle/cuda"], [("metal-candle", "gpu")])?;
        Ok(Crew { folder: results_folder()?, bench, python: python(), workers: Vec::new() })
    }

    /// What our side can do, and who else can.
    fn rows(&self, options: &Options) -> Result<Vec<Row>> {
        let list = output(Command::new(&self.bench).arg("--list"))?;
        let rows = list.lines().map(|line| row(&serde_json::from_str(line)?));
        let rows: Vec<Row> = rows.collect::<Result<_>>()?;
        Ok(rows.into_iter().filter(|row| options.wants(&row.name)).collect())
    }

    /// An answer, or why there is none; from one who has the device alone if it is a model.
    fn ask(&mut self, who: &str, question: &str, alone: bool) -> Value {
        if alone {
            self.workers.clear();
        }
        let answer = self.try_ask(who, question);
        let answer = answer.unwrap_or_else(|why| {
            self.workers.retain(|(name, _)| name != who);
            json!({ "missing": format!("{why:#}") })
        });
        if alone {
            self.workers.clear();
        }
        answer
    }

    fn try_ask(&mut self, who: &str, question: &str) -> Result<Value> {
        let known = self.workers.iter().position(|(name, _)| name == who);
        let at = match known {
            Some(at) => at,
            None => {
                let log = format!("gpu {}.log", who.replace([' ', '+'], ""));
                let worker = Worker::start(who, &mut self.command(who)?, self.folder.join(log))?;
                self.workers.push((who.to_owned(), worker));
                self.workers.len() - 1
            }
        };
        self.workers[at].1.ask(question)
    }

    fn command(&self, who: &str) -> Result<Command> {
        if who == "ours" {
            let mut command = Command::new(&self.bench);
            command.args(["--serve", "--device", DEVICE]).current_dir(root());
            return Ok(command);
        }
        let python = self.python.as_ref();
        let python = python.map_err(|why| anyhow!("no Python environment: {why:#}"))?;
        let script = self.folder.join("bench_gpu.py");
        std::fs::write(&script, PEERS).with_context(|| script.display().to_string())?;
        let mut command = program(python);
        command.arg(script).args([who, DEVICE]);
        Ok(command)
    }
}

/// A row of our bench's list.
fn row(line: &Value) -> Result<Row> {
    let name = line["row"].as_str().context("the bench lists a row without a name")?;
    let work = line["work"].clone();
    let size = |key: &str| work[key].as_f64().with_context(|| format!("{name} lacks {key}"));
    let (peers, unit, is_model) = match work["work"].as_str() {
        Some("train") => (TRAINERS, Unit::Tokens(size("batch")? * size("seq")?), true),
        Some("decode") => (GENERATORS, Unit::Tokens(1.0), true),
        _ => (TENSORS, Unit::Time, false),
    };
    let floor = Floor::default();
    Ok(Row { name: name.to_owned(), work, peers, unit, floor, is_model, note: None })
}

/// One with a PyTorch that sees the GPU: the machine's own, or the environment of `bench cpu`.
fn python() -> Result<PathBuf> {
    if let Ok(own) = own_python() {
        return Ok(own);
    }
    let python = reference::environment("peers", "reference/peers.lock")?;
    let refused = || anyhow!("neither python3 nor {} has a PyTorch for it", python.display());
    if sees_gpu(&python) { Ok(python) } else { Err(refused()) }
}

fn own_python() -> Result<PathBuf> {
    let own = PathBuf::from("python3");
    let refused = || anyhow!("python3 has no PEFT, transformers and PyTorch for the GPU");
    if sees_gpu(&own) { Ok(own) } else { Err(refused()) }
}

fn sees_gpu(python: &PathBuf) -> bool {
    let probe = "import peft, torch, transformers; assert torch.cuda.is_available()";
    works(program(python).args(["-c", probe]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listed_row_has_the_peers_and_the_unit_of_its_work() {
        let line = json!({"row": "train x", "work": {"work": "train", "batch": 2, "seq": 8}});
        let row = row(&line).unwrap();
        assert!(matches!(row.unit, Unit::Tokens(16.0)));
        assert_eq!((row.peers, row.is_model), (TRAINERS, true));
        let line = json!({"row": "softmax", "work": {"work": "softmax", "dims": [2, 8]}});
        assert_eq!(super::row(&line).unwrap().peers, TENSORS);
    }

    #[test]
    fn a_row_without_its_sizes_is_refused_by_name() {
        let line = json!({"row": "train x", "work": {"work": "train", "seq": 8}});
        let error = row(&line).err().unwrap().to_string();
        assert!(error.contains("train x") && error.contains("batch"), "{error}");
    }
}

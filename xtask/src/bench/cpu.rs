//! `cargo xtask bench cpu`: our work, everybody else's and the machine's ceilings, in turn, in one sitting.

use super::rows::{self, Row};
use super::table::{Figures, Measured, print_head};
use super::worker::Worker;
use super::{Options, build, processor, results_folder};
use crate::command::{program, root};
use crate::{model, reference};
use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

pub(super) fn run(options: &Options) -> Result<()> {
    let mut crew = Crew::gather(options)?;
    let all = rows::all(&model::fetch()?, &model::fetch_encoder()?, options.quick);
    let wanted: Vec<&Row> = all.iter().filter(|row| options.wants(&row.name)).collect();
    let file = options.json.clone().unwrap_or_else(|| crew.folder.join("cpu.json"));
    let processor = processor();
    print_head();
    let mut measured = Vec::new();
    for row in wanted {
        let figures = measure(row, options, &mut crew)?;
        figures.print();
        measured.push(figures.json());
        let page = json!({
            "threads": options.threads,
            "quick": options.quick,
            "processor": processor,
            "ceilings": crew.ceilings,
            "rows": measured,
        });
        // After each row: a run that is stopped leaves what it has.
        std::fs::write(&file, serde_json::to_string_pretty(&page)?)
            .with_context(|| file.display().to_string())?;
    }
    println!(
        "\n{} threads; ratio: how many times ours is as fast, round by round",
        options.threads
    );
    println!("figures: {}", file.display());
    if options.quick {
        println!("--quick: this shows that every row works, and no more");
    }
    Ok(())
}

/// A row, round by round: the ceilings, ours, every peer; and again.
fn measure<'r>(row: &'r Row, options: &Options, crew: &mut Crew) -> Result<Measured<'r>> {
    let (rounds, warmup, calls, seconds) = match (options.quick, row.is_model) {
        (true, _) => (2, 1, 1, 0.02),
        (false, true) => (5, 1, 1, 0.0),
        (false, false) => (7, 5, 5, 0.3),
    };
    let question = json!({"row": row.work, "warmup": warmup, "calls": calls, "seconds": seconds});
    let question = question.to_string();
    let (mut floor_seconds, mut binds) = (Vec::new(), None);
    let mut ours = Figures::default();
    let mut peers: Vec<Figures> = row.peers.iter().map(|_| Figures::default()).collect();
    if row.is_model {
        crew.dismiss();
    }
    for _ in 0..rounds {
        let per_second = crew.measure_ceilings(&row.floor.ceilings())?;
        if let Some((seconds, name)) = row.floor.seconds(&per_second) {
            floor_seconds.push(seconds);
            binds = Some(name);
        }
        ours.add(&crew.ask("ours", &question));
        for (peer, figures) in row.peers.iter().zip(&mut peers) {
            // What one round lacked, the next would lack, too.
            if figures.missing.is_none() {
                figures.add(&crew.ask(peer, &question));
            }
        }
    }
    if row.is_model {
        crew.dismiss();
    }
    Ok(Measured { row, ours, peers, floor_seconds, binds })
}

/// All who measure. They are started when first asked.
struct Crew {
    folder: PathBuf,
    threads: usize,
    /// Our side.
    bench: PathBuf,
    /// The machine's.
    ceilings_bench: PathBuf,
    /// Or why there is none.
    python: Result<PathBuf>,
    workers: BTreeMap<String, Worker>,
    /// The last answer for each.
    ceilings: BTreeMap<String, Value>,
}

impl Crew {
    fn gather(options: &Options) -> Result<Crew> {
        let benches = [("metal-candle", "cpu"), ("metal-candle-runtime", "ceilings")];
        let [bench, ceilings_bench] = build(options.quick, &[], benches)?;
        Ok(Crew {
            folder: results_folder()?,
            threads: options.threads,
            bench,
            ceilings_bench,
            python: reference::environment("peers", "reference/peers.lock"),
            workers: BTreeMap::new(),
            ceilings: BTreeMap::new(),
        })
    }

    /// An answer, or why there is none.
    fn ask(&mut self, who: &str, question: &str) -> Value {
        let answer = self.try_ask(who, question);
        answer.unwrap_or_else(|why| {
            self.workers.remove(who);
            json!({ "missing": format!("{why:#}") })
        })
    }

    fn try_ask(&mut self, who: &str, question: &str) -> Result<Value> {
        if !self.workers.contains_key(who) {
            let log = format!("{}.log", who.replace([' ', '=', '+'], ""));
            let worker = Worker::start(who, &mut self.command(who)?, self.folder.join(log))?;
            self.workers.insert(who.to_owned(), worker);
        }
        self.workers.get_mut(who).expect("it was just started").ask(question)
    }

    fn command(&self, who: &str) -> Result<Command> {
        let threads = self.threads.to_string();
        let mut command = match who {
            "ceilings" => Command::new(&self.ceilings_bench),
            "ours" | "candle" => Command::new(&self.bench),
            _ => {
                let python = self.python.as_ref();
                let python = python.map_err(|why| anyhow!("no Python environment: {why:#}"))?;
                let mut command = program(python);
                command.args(["reference/bench.py", who, &threads]);
                command.env("OMP_NUM_THREADS", &threads);
                return Ok(command);
            }
        };
        command.arg("--serve").env("RAYON_NUM_THREADS", &threads).current_dir(root());
        if who != "ceilings" {
            command.arg(who);
        }
        Ok(command)
    }

    /// Those of these that the machine has.
    fn measure_ceilings(&mut self, names: &[String]) -> Result<BTreeMap<String, f64>> {
        let mut found = BTreeMap::new();
        for name in names {
            let answer = self.try_ask("ceilings", name)?;
            if let Some(per_second) = answer["per_second"].as_f64() {
                found.insert(name.clone(), per_second);
            }
            self.ceilings.insert(name.clone(), answer);
        }
        Ok(found)
    }

    /// Ends all but the one for the ceilings, and so frees their memory.
    fn dismiss(&mut self) {
        self.workers.retain(|who, _| who == "ceilings");
    }
}

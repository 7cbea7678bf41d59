//! What a GPU does of the work that peers are timed at, and what of it is the device's own ceiling.
//!
//! ```text
//! cargo bench -p metal-candle --features cuda --bench gpu -- [--device cuda:0] [--steps] FILTER..
//! cargo bench -p metal-candle --features cuda --bench gpu -- --list FILTER..  the rows, and what each consists of
//! cargo bench -p metal-candle --features cuda --bench gpu -- --serve          answers `cargo xtask bench cuda`
//! ```
//!
//! One JSON line for each row. Everything is made on the device, so that the program runs where there is no source
//! tree. `--steps` prints the seconds of each kind of step beside a row.

#[path = "support/kinds.rs"]
mod kinds;
#[path = "gpu/model.rs"]
mod model;
#[path = "gpu/ops.rs"]
mod ops;

use metal_candle::Device;
use ops::Ceilings;
use serde_json::{Value, json};
use std::error::Error;

/// Why a row cannot be measured.
type Failure = Box<dyn Error>;

/// What every row is asked.
struct Context {
    device: Device,
    steps: bool,
}

/// One line of what is printed.
struct Row {
    name: String,
    /// What a peer has to do for the same.
    /// What it is, for peers to do the same; null where there is nothing to compare.
    work: Value,
    measure: Measure,
}

/// The seconds, those that the ceiling leaves, and what else there is to say, as an object.
type Measure = Box<dyn Fn(&Context, &Ceilings) -> Result<Value, Failure>>;

impl Row {
    fn measured(&self, context: &Context, ceilings: &Ceilings) -> Result<Value, Failure> {
        let mut line = json!({"row": self.name});
        let measured = (self.measure)(context, ceilings)?;
        if let (Value::Object(line), Value::Object(measured)) = (&mut line, measured) {
            line.extend(measured);
        }
        Ok(line)
    }
}

fn main() -> Result<(), Failure> {
    let mut context = Context { device: Device::best(), steps: false };
    let (mut filters, mut list, mut serve) = (Vec::new(), false, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            // Cargo adds it.
            "--bench" => {}
            "--steps" => context.steps = true,
            "--list" => list = true,
            "--serve" => serve = true,
            "--device" => {
                let name = args.next().ok_or("--device: expected cuda:0 or the like")?;
                context.device = Device::parse(&name)?;
            }
            filter => filters.push(filter.to_owned()),
        }
    }
    let wanted = |row: &Row| filters.is_empty() || filters.iter().any(|f| row.name.contains(f));
    let rows: Vec<Row> = ops::rows().into_iter().chain(model::rows()).filter(wanted).collect();
    if list {
        for row in rows.iter().filter(|row| !row.work.is_null()) {
            println!("{}", json!({"row": row.name, "work": row.work}));
        }
        return Ok(());
    }
    let ceilings = Ceilings::measure(&context)?;
    if serve {
        return serve_lines(&context, &ceilings, &rows);
    }
    println!("{}", json!({"device": context.device.describe()?}));
    println!("{}", ceilings.json());
    for row in &rows {
        println!("{}", row.measured(&context, &ceilings)?);
    }
    Ok(())
}

/// Answers each line that names a row, `{"name": ROW}`, with a line; any other with the device and its ceilings.
fn serve_lines(context: &Context, ceilings: &Ceilings, rows: &[Row]) -> Result<(), Failure> {
    for line in std::io::stdin().lines() {
        let question: Value = serde_json::from_str(&line?)?;
        let answer = match rows.iter().find(|row| question["name"] == row.name.as_str()) {
            Some(row) => row
                .measured(context, ceilings)
                .unwrap_or_else(|why| json!({"missing": why.to_string()})),
            None => json!({"device": context.device.describe()?, "ceilings": ceilings.json()}),
        };
        println!("{answer}");
    }
    Ok(())
}

/// The median.
fn median(mut times: Vec<f64>) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    times[times.len() / 2]
}

/// To so many digits behind the point.
fn rounded(x: f64, digits: i32) -> f64 {
    let power = 10f64.powi(digits);
    (x * power).round() / power
}

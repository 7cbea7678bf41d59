//! Kernels that need not wait for each other, as one: many a small one takes no longer than its launch.

use super::launch::{Launch, Team};
use super::text::Text;
use super::{Dialect, Source};
use rustc_hash::FxHasher;
use std::hash::Hasher;
use std::ops::Range;

/// A kernel that does what all `members` do, each on blocks of its own. Its operands are theirs, one after the other. They
/// have blocks of one size; equal ones stand in the text once. None where they are of a language whose kernels cannot be
/// called, or there is one only.
///
/// # Panics
/// Where their blocks have different sizes.
pub fn beside(members: &[&Source], dialect: &Dialect) -> Option<Source> {
    let block = members.first()?.launch.block;
    let same = members.iter().all(|member| member.launch.block == block);
    assert!(same, "metal-candle bug: blocks of different sizes side by side");
    if members.len() < 2 || dialect.function.is_none() {
        return None;
    }
    let launch = Launch {
        team: Team::Block,
        vector: 1,
        grid: members.iter().map(|member| member.launch.grid).sum(),
        block,
        shared_bytes: members.iter().map(|member| member.launch.shared_bytes).max().unwrap_or(0),
    };
    let text = text(members, dialect, &launch);
    let mut hash = FxHasher::default();
    hash.write(text.as_bytes());
    let name = format!("beside_{:016x}", hash.finish());
    Some(Source {
        text: text.replace("{name}", &name),
        name,
        bindings: members.iter().flat_map(|member| member.bindings.iter().copied()).collect(),
        launch,
        align_bytes: members.iter().map(|member| member.align_bytes).max().unwrap_or(1),
        is_call: members.iter().any(|member| member.is_call),
    })
}

/// Members of one text.
struct Kind<'a> {
    source: &'a Source,
    /// Where each one's operands begin, among all.
    operands: Vec<usize>,
}

/// With `{name}` for the kernel's name.
fn text(members: &[&Source], dialect: &Dialect, launch: &Launch) -> String {
    let kinds = kinds(members);
    let mut text: String = kinds
        .iter()
        .enumerate()
        .map(|(i, kind)| dialect.as_function(kind.source, &part(i)))
        .collect();
    let count: usize = members.iter().map(|member| member.bindings.len()).sum();
    let any = |n: usize| dialect.output.replace("{type}", "u8").replace("{name}", &operand(n));
    let operands: Vec<String> = (0..count).map(any).collect();
    let head = dialect.kernel.replace("{block}", &launch.block.to_string());
    let mut body = Text::default();
    body.open(format!("{head}({})", operands.join(", ")));
    body.line(dialect.first_lines[0]);
    body.line("(void)tid, (void)blocks;");
    let mut first = 0;
    for (i, kind) in kinds.iter().enumerate() {
        let blocks = first..first + kind.operands.len() * kind.source.launch.grid;
        first = blocks.end;
        call(&mut body, i, kind, blocks);
    }
    body.close();
    text += &body.finish();
    text
}

/// Members of equal text are beside each other.
fn kinds<'a>(members: &[&'a Source]) -> Vec<Kind<'a>> {
    let (mut kinds, mut at): (Vec<Kind<'a>>, usize) = (Vec::new(), 0);
    for source in members {
        match kinds.iter_mut().find(|kind| kind.source.text == source.text) {
            Some(kind) => kind.operands.push(at),
            None => kinds.push(Kind { source, operands: vec![at] }),
        }
        at += source.bindings.len();
    }
    kinds
}

/// The call of the members of a kind, by the blocks that are theirs.
fn call(body: &mut Text, number: usize, kind: &Kind<'_>, blocks: Range<usize>) {
    let Kind { source, operands } = kind;
    let grid = source.launch.grid;
    body.open(format!("if (block >= {} && block < {})", blocks.start, blocks.end));
    body.line(format!("const u32 own = block - {};", blocks.start));
    let mut arguments = vec![format!("own % {grid}"), grid.to_string()];
    for n in 0..source.bindings.len() {
        arguments.push(format!("Any{{{}}}", chosen(operands, n, grid)));
    }
    body.line(format!("{}({});", part(number), arguments.join(", ")));
    body.close();
}

/// The `n`-th operand of the member whose block this is.
fn chosen(operands: &[usize], n: usize, grid: usize) -> String {
    let (last, others) = operands.split_last().expect("metal-candle bug: a kind of no member");
    let choice = |(i, first): (usize, &usize)| {
        format!("own < {} ? {} : ", (i + 1) * grid, operand(first + n))
    };
    let choices: String = others.iter().enumerate().map(choice).collect();
    choices + &operand(last + n)
}

fn part(number: usize) -> String {
    format!("{{name}}_part{number}")
}

fn operand(number: usize) -> String {
    format!("p{number}")
}

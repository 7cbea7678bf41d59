//! Kernels that need not wait for each other, as one: many a small one takes no longer than its launch.

use super::dialect::Shared;
use super::launch::{Launch, Team};
use super::text::Text;
use super::{Dialect, Source};
use rustc_hash::FxHasher;
use std::hash::Hasher;
use std::ops::Range;

/// A kernel that every block of others runs as a whole before its own work, for itself: less than a launch takes. The first
/// block leaves the results in their places, for whoever else reads them; the others keep theirs in shared memory.
#[derive(Clone, Debug)]
pub struct Ahead<'a> {
    /// No in-place kernel: blocks that are late read its arguments once more.
    pub source: &'a Source,
    /// The bytes of each output, by the number of its operand.
    pub outputs: Vec<(usize, usize)>,
    /// Operands that are outputs, by their number among those of all members: that operand of the kernel ahead.
    pub readers: Vec<(usize, usize)>,
}

/// A kernel that does what all `members` do, each on blocks of its own, after what is `ahead` of them. Its operands are those
/// of the kernel ahead, and theirs, one after the other. Equal members stand in the text once.
///
/// None where there is one kernel only, and in a language whose kernels cannot be called.
///
/// # Panics
/// Where their blocks have different sizes.
pub fn beside(members: &[&Source], ahead: Option<&Ahead<'_>>, dialect: &Dialect) -> Option<Source> {
    let every: Vec<&Source> =
        ahead.iter().map(|ahead| ahead.source).chain(members.iter().copied()).collect();
    let block = every.first()?.launch.block;
    let same = every.iter().all(|member| member.launch.block == block);
    assert!(same, "metal-candle bug: blocks of different sizes side by side");
    if every.len() < 2 || dialect.function.is_none() {
        return None;
    }
    let own = every.iter().map(|member| member.launch.shared_bytes).max().unwrap_or(0);
    let own = own.next_multiple_of(SHARED_ALIGN);
    let kept: usize = ahead.map_or(0, |ahead| ahead.offsets().1);
    let launch = Launch {
        team: Team::Block,
        vector: 1,
        grid: members.iter().map(|member| member.launch.grid).sum(),
        block,
        resident: every.iter().map(|member| member.launch.resident).max().unwrap_or(1),
        shared_bytes: if kept > 0 { own + kept } else { own },
    };
    let joined = Joined { members, ahead, dialect, own_shared_bytes: own };
    let text = joined.text(&launch);
    let mut hash = FxHasher::default();
    hash.write(text.as_bytes());
    let name = format!("beside_{:016x}", hash.finish());
    Some(Source {
        text: text.replace("{name}", &name),
        name,
        bindings: every.iter().flat_map(|member| member.bindings.iter().copied()).collect(),
        launch,
        align_bytes: every.iter().map(|member| member.align_bytes).max().unwrap_or(1),
        is_call: every.iter().any(|member| member.is_call),
        asks_first: None,
    })
}

/// Of what blocks keep in shared memory.
const SHARED_ALIGN: usize = 256;

impl Ahead<'_> {
    /// Where each output is kept, and the bytes of all.
    fn offsets(&self) -> (Vec<usize>, usize) {
        let mut end = 0;
        let mut offset = |(_, bytes): &(usize, usize)| {
            let start = end;
            end += bytes.next_multiple_of(SHARED_ALIGN);
            start
        };
        (self.outputs.iter().map(&mut offset).collect(), end)
    }
}

struct Joined<'a> {
    members: &'a [&'a Source],
    ahead: Option<&'a Ahead<'a>>,
    dialect: &'a Dialect,
    /// What the kernels share in a block for themselves.
    own_shared_bytes: usize,
}

/// Members of one text.
struct Kind<'a> {
    source: &'a Source,
    /// Where each one's operands begin, among all.
    operands: Vec<usize>,
}

impl Joined<'_> {
    /// With `{name}` for the kernel's name.
    fn text(&self, launch: &Launch) -> String {
        let (dialect, kinds) = (self.dialect, kinds(self.members, self.first_operand()));
        let function = |source, name: String| dialect.as_function(source, &name);
        let mut text: String =
            self.ahead.map_or_else(String::new, |a| function(a.source, AHEAD.into()));
        text.extend(kinds.iter().enumerate().map(|(i, kind)| function(kind.source, part(i))));
        let count: usize = self.members.iter().map(|member| member.bindings.len()).sum();
        let any = |n: usize| dialect.output.replace("{type}", "u8").replace("{name}", &operand(n));
        let operands: Vec<String> = (0..self.first_operand() + count).map(any).collect();
        let head = dialect.head(launch);
        let mut body = Text::default();
        body.open(format!("{head}({})", operands.join(", ")));
        body.line(dialect.first_lines[0]);
        body.line("(void)tid, (void)blocks;");
        self.ahead.into_iter().for_each(|ahead| self.define_ahead(&mut body, ahead));
        let mut first = 0;
        for (i, kind) in kinds.iter().enumerate() {
            let blocks = first..first + kind.operands.len() * kind.source.launch.grid;
            first = blocks.end;
            self.call(&mut body, i, kind, blocks);
        }
        body.close();
        text += &body.finish();
        text
    }

    /// The members' operands come after those of the kernel ahead.
    fn first_operand(&self) -> usize {
        self.ahead.map_or(0, |ahead| ahead.source.bindings.len())
    }

    /// What runs the kernel ahead, which members call.
    fn define_ahead(&self, body: &mut Text, ahead: &Ahead<'_>) {
        if let Shared::Line(line) = self.dialect.shared {
            body.line(line);
        }
        body.line(format!("u8* const kept = (u8*)shared + {};", self.own_shared_bytes));
        for ((n, _), offset) in ahead.outputs.iter().zip(ahead.offsets().0) {
            let own = format!("block == 0 ? {} : kept + {offset}", operand(*n));
            body.line(format!("u8* const {} = {own};", made(*n)));
        }
        let argument = |n: usize| match ahead.outputs.iter().any(|(output, _)| *output == n) {
            true => format!("Any{{{}}}", made(n)),
            false => format!("Any{{{}}}", operand(n)),
        };
        let arguments: Vec<String> = (0..self.first_operand()).map(argument).collect();
        body.open("const auto ahead = [&]");
        body.line(format!("{AHEAD}(0, 1, {});", arguments.join(", ")));
        body.line("barrier();");
        body.end_type();
    }

    /// The call of the members of a kind, by the blocks that are theirs.
    fn call(&self, body: &mut Text, number: usize, kind: &Kind<'_>, blocks: Range<usize>) {
        let grid = kind.source.launch.grid;
        body.open(format!("if (block >= {} && block < {})", blocks.start, blocks.end));
        body.line(format!("const u32 own = block - {};", blocks.start));
        let mut arguments = vec![format!("own % {grid}"), grid.to_string()];
        match (kind.source.asks_first.is_some(), self.ahead) {
            (true, Some(_)) => arguments.insert(0, "ahead".into()),
            (true, None) => arguments.insert(0, "Predecessor{}".into()),
            (false, Some(_)) => body.line("ahead();"),
            (false, None) => {}
        }
        for n in 0..kind.source.bindings.len() {
            arguments.push(format!("Any{{{}}}", self.chosen(&kind.operands, n, grid)));
        }
        body.line(format!("{}({});", part(number), arguments.join(", ")));
        body.close();
    }

    /// The `n`-th operand of the member whose block this is.
    fn chosen(&self, operands: &[usize], n: usize, grid: usize) -> String {
        let (last, others) = operands.split_last().expect("metal-candle bug: a kind of no member");
        let choice = |(i, first): (usize, &usize)| {
            format!("own < {} ? {} : ", (i + 1) * grid, self.name(first + n))
        };
        let choices: String = others.iter().enumerate().map(choice).collect();
        choices + &self.name(last + n)
    }

    /// An operand, or what was made of it ahead.
    fn name(&self, number: usize) -> String {
        let of_members = number - self.first_operand();
        let readers = self.ahead.iter().flat_map(|ahead| &ahead.readers);
        let output = readers.filter(|(reader, _)| *reader == of_members).map(|(_, n)| *n).next();
        output.map_or_else(|| operand(number), made)
    }
}

/// Members of equal text are beside each other; operands are counted from `first` on.
fn kinds<'a>(members: &[&'a Source], first: usize) -> Vec<Kind<'a>> {
    let (mut kinds, mut at): (Vec<Kind<'a>>, usize) = (Vec::new(), first);
    for source in members {
        match kinds.iter_mut().find(|kind| kind.source.text == source.text) {
            Some(kind) => kind.operands.push(at),
            None => kinds.push(Kind { source, operands: vec![at] }),
        }
        at += source.bindings.len();
    }
    kinds
}

const AHEAD: &str = "{name}_ahead";

fn part(number: usize) -> String {
    format!("{{name}}_part{number}")
}

fn operand(number: usize) -> String {
    format!("p{number}")
}

/// What a block has of an output of the kernel ahead.
fn made(number: usize) -> String {
    format!("made{number}")
}

//! Walks the rows and tiles of a [`Program`].

use super::reduce::LANES;
use super::{Access, Op, Place, Program, Reduction, RowWalk, Seed, Split};
use crate::cpu::{parallel, scratch};
use metal_candle_graph::{Class, DType, Distribution, Scalar, random_f64};
use smallvec::SmallVec;

/// The operands' memory.
#[derive(Clone, Copy)]
struct Memory<'a> {
    args: &'a [*const u8],
    outs: &'a [*mut u8],
}

// SAFETY: tasks write what is theirs and read what nobody writes, but for what they replace at the same place.
unsafe impl Sync for Memory<'_> {}

impl Program {
    /// # Safety
    /// Every access of the kernel stays within the memory of its operand, which is initialised where it is read. Nobody
    /// else touches the outputs or writes the arguments. Stores reach distinct places; where one reaches what
    /// a load reads, it is the same point of the space, and [`Program::new`] was told.
    pub(crate) unsafe fn run(&self, args: &[*const u8], outs: &[*mut u8], parallel: bool) {
        let memory = Memory { args, outs };
        // Whole, not by its fields: it is `Sync` as a whole.
        let memory = &memory;
        parallel::for_each(parallel, self.tasks(), |task| {
            let words = self.scratch_bytes.div_ceil(size_of::<i64>());
            scratch::with(words, |scratch: &mut [i64]| {
                let mut worker = Worker::new(self, *memory, scratch);
                // SAFETY: the caller's promise; tasks are disjoint rows or columns.
                unsafe { worker.run(task) };
            });
        });
    }

    fn tasks(&self) -> usize {
        let rows = self.rows();
        match self.split {
            Split::Rows(n) => rows.div_ceil(n),
            Split::Columns(n) => rows * self.cols().div_ceil(n),
            Split::Tiles { run_len, tiles } => self.tiles(run_len).div_ceil(tiles),
        }
    }

    fn tiles(&self, run_len: usize) -> usize {
        let runs = self.rows().checked_div(run_len).unwrap_or(0);
        runs * run_len.div_ceil(self.tile_len)
    }
}

impl Access {
    /// Where row number `row` starts.
    fn row_offset(&self, extents: &[usize], row: usize) -> isize {
        match self.rows {
            RowWalk::Flat => self.offset + row as isize * self.row_step(extents),
            RowWalk::Axes => self.offset + offset_of(extents, &self.strides, row),
            // The walk within the tile adds the rows.
            RowWalk::Broken => self.offset,
        }
    }

    /// The stride of the innermost row axis.
    fn row_step(&self, extents: &[usize]) -> isize {
        extents.len().checked_sub(1).map_or(0, |last| self.strides[last])
    }
}

/// `Σ i·stride` of position `at`, in row-major order, of the axes.
fn offset_of(extents: &[usize], strides: &[isize], at: usize) -> isize {
    let (mut rest, mut offset) = (at, 0);
    for (extent, stride) in extents.iter().zip(strides).rev() {
        offset += (rest % extent) as isize * stride;
        rest /= extent;
    }
    offset
}

/// One task at work.
struct Worker<'a> {
    p: &'a Program,
    memory: Memory<'a>,
    scratch: *mut u8,
    /// Where each access is: at the row, and at the tile.
    row_at: SmallVec<[isize; 16]>,
    at: SmallVec<[isize; 16]>,
    /// The first row of the tile.
    row: usize,
    /// The first column of the tile.
    col: usize,
}

impl<'a> Worker<'a> {
    fn new(p: &'a Program, memory: Memory<'a>, scratch: &'a mut [i64]) -> Worker<'a> {
        let n = p.accesses.len();
        let zeros = || SmallVec::from_elem(0, n);
        let scratch = scratch.as_mut_ptr().cast();
        Worker { p, memory, scratch, row_at: zeros(), at: zeros(), row: 0, col: 0 }
    }

    unsafe fn run(&mut self, task: usize) {
        let (p, rows, cols) = (self.p, self.p.rows(), self.p.cols());
        self.go_to_row(0);
        // SAFETY: the caller's promise, here and below.
        unsafe { self.exec(&p.uniform, 1) };
        match p.split {
            Split::Rows(n) => {
                for row in task * n..(task * n + n).min(rows) {
                    // SAFETY: as above.
                    unsafe { self.row_along(row, 0..cols) };
                }
            }
            Split::Columns(n) => {
                let parts = cols.div_ceil(n);
                let (row, start) = (task / parts, task % parts * n);
                // SAFETY: as above.
                unsafe { self.row_along(row, start..(start + n).min(cols)) };
            }
            Split::Tiles { run_len, tiles } => {
                let in_run = run_len.div_ceil(p.tile_len);
                for tile in task * tiles..(task * tiles + tiles).min(p.tiles(run_len)) {
                    let start = tile % in_run * p.tile_len;
                    let n = p.tile_len.min(run_len - start);
                    // SAFETY: as above.
                    unsafe { self.tile_across(tile / in_run * run_len + start, n) };
                }
            }
        }
    }

    fn go_to_row(&mut self, row: usize) {
        self.row = row;
        let extents = &self.p.space[..self.p.row_axes];
        let accesses = self.row_at.iter_mut().zip(&mut self.at).zip(&self.p.accesses);
        for ((row_at, at), access) in accesses {
            *row_at = access.row_offset(extents, row);
            *at = *row_at;
        }
    }

    /// One row, tile by tile, in every pass.
    unsafe fn row_along(&mut self, row: usize, cols: std::ops::Range<usize>) {
        let p = self.p;
        self.go_to_row(row);
        for pass in &p.passes {
            // SAFETY: the caller's promise; the partial results have their place.
            unsafe {
                self.exec(&pass.before, 1);
                for reduction in &pass.reductions {
                    (reduction.reducer.clear)(self.write_to(reduction.acc), LANES);
                }
                self.columns(&pass.body, cols.clone());
                for reduction in &pass.reductions {
                    let lanes = self.read_from(reduction.acc);
                    (reduction.reducer.join)(self.write_to(reduction.joined), lanes);
                    self.wrap(reduction, 1);
                }
            }
        }
        // What is written once a row is written with its first columns.
        if cols.start == 0 {
            // SAFETY: the caller's promise.
            unsafe { self.exec(&p.last, 1) };
        }
    }

    /// `ops` over the columns of this row.
    unsafe fn columns(&mut self, ops: &[Op], cols: std::ops::Range<usize>) {
        let p = self.p;
        let (inner_axis, outer_axes) = (p.space.len() - 1, p.row_axes..p.space.len() - 1);
        let inner = p.space[inner_axis];
        let outer = &p.space[outer_axes.clone()];
        let mut col = cols.start;
        while col < cols.end {
            let (segment, start) =
                if outer.is_empty() { (0, col) } else { (col / inner, col % inner) };
            let n = p.tile_len.min(inner - start).min(cols.end - col);
            for ((at, row_at), access) in self.at.iter_mut().zip(&self.row_at).zip(&p.accesses) {
                *at = row_at + start as isize * access.step;
                if !outer.is_empty() {
                    *at += offset_of(outer, &access.strides[outer_axes.clone()], segment);
                }
            }
            self.col = col;
            // SAFETY: the caller's promise.
            unsafe { self.exec(ops, n) };
            col += n;
        }
    }

    /// `n` rows side by side, column by column, in every pass.
    unsafe fn tile_across(&mut self, row: usize, n: usize) {
        let p = self.p;
        let extents = &p.space[p.row_axes..];
        let cols = p.cols();
        self.go_to_row(row);
        for pass in &p.passes {
            // SAFETY: the caller's promise; the partial results have their place.
            unsafe {
                self.exec(&pass.before, n);
                for reduction in &pass.reductions {
                    (reduction.reducer.clear)(self.write_to(reduction.acc), n);
                }
            }
            for col in 0..cols {
                if !extents.is_empty() {
                    let accesses = self.at.iter_mut().zip(&self.row_at).zip(&p.accesses);
                    for ((at, row_at), access) in accesses {
                        *at = row_at + offset_of(extents, &access.strides[p.row_axes..], col);
                    }
                }
                // SAFETY: the caller's promise.
                unsafe { self.exec(&pass.body, n) };
            }
            for reduction in &pass.reductions {
                // SAFETY: the row values have their place.
                unsafe { self.wrap(reduction, n) };
            }
        }
        // SAFETY: the caller's promise.
        unsafe { self.exec(&p.last, n) };
    }

    unsafe fn wrap(&self, reduction: &Reduction, n: usize) {
        if let Some((f, out)) = reduction.wrap {
            let from = self.read_from(reduction.joined);
            // SAFETY: the caller's promise.
            unsafe { f(self.write_to(out), [from, std::ptr::null(), std::ptr::null()], n) };
        }
    }

    unsafe fn exec(&mut self, ops: &[Op], n: usize) {
        for op in ops {
            // SAFETY: the caller's promise for memory; the compiler of the program has seen to the places.
            unsafe {
                match *op {
                    Op::Map { f, ins, out } => {
                        // One by one: `map` would be a call for each.
                        let [a, b, c] = ins;
                        let ins = [self.read_from(a), self.read_from(b), self.read_from(c)];
                        f(self.write_to(out), ins, n);
                    }
                    Op::MapAhead { f, ins: [a, b], ahead: [p, q], out } => {
                        let ins = [self.read_from(a), self.read_from(b)];
                        f(self.write_to(out), ins, [self.read_from(p), self.read_from(q)], n);
                    }
                    Op::Load { access, load, out } => {
                        let (to, a) = (self.write_to(out), &self.p.accesses[access as usize]);
                        self.runs(access, n, |start, len, at| {
                            let to = to.add(start * a.register_bytes);
                            load(to, self.address(a, at), a.step, len);
                        });
                    }
                    Op::Store { access, store, from } => {
                        let (from, a) = (self.read_from(from), &self.p.accesses[access as usize]);
                        self.runs(access, n, |start, len, at| {
                            let from = from.add(start * a.register_bytes);
                            store(self.address(a, at).cast_mut(), a.step, from, len);
                        });
                    }
                    Op::Fold { f, acc, from } => f(self.write_to(acc), self.read_from(from), n),
                    Op::Dot { f, acc, from } => {
                        let [a, b] = from;
                        f(self.write_to(acc), [self.read_from(a), self.read_from(b)], n);
                    }
                    Op::Const { value, out } => write(self.write_to(out), 0, value),
                    Op::Index { access, dtype, out } => self.index(access, dtype, out, n),
                    Op::Random { access, distribution, stream, seed, dtype, out } => {
                        self.random(access, (distribution, stream, seed), dtype, out, n);
                    }
                }
            }
        }
    }

    unsafe fn index(&self, access: u16, dtype: DType, out: Place, n: usize) {
        let to = self.write_to(out);
        let step = self.p.accesses[access as usize].step;
        self.runs(access, n, |start, len, at| {
            for i in 0..len {
                let value = Scalar::from_i64(dtype, (at + i as isize * step) as i64);
                // SAFETY: the caller's promise.
                unsafe { write(to, start + i, value) };
            }
        });
    }

    unsafe fn random(
        &self,
        access: u16,
        (distribution, stream, seed): (Distribution, u32, Seed),
        dtype: DType,
        out: Place,
        n: usize,
    ) {
        let to = self.write_to(out);
        let seeds = self.read_from(seed.place).cast::<i64>();
        let step = self.p.accesses[access as usize].step;
        self.runs(access, n, |start, len, at| {
            for i in 0..len {
                let seed_at = if seed.is_one { 0 } else { start + i };
                // SAFETY: the caller's promise.
                let seed = unsafe { *seeds.add(seed_at) };
                let element = (at + i as isize * step) as u64;
                let x = random_f64(distribution, seed, stream, element);
                // SAFETY: the caller's promise.
                unsafe { write(to, start + i, Scalar::from_f64(dtype, x)) };
            }
        });
    }

    /// `f(first register, registers, where the access is)` for every stretch of the tile with one step.
    fn runs(&self, access: u16, n: usize, mut f: impl FnMut(usize, usize, isize)) {
        let at = self.at[access as usize];
        let access = &self.p.accesses[access as usize];
        if access.rows != RowWalk::Broken {
            return f(0, n, at);
        }
        let extents = &self.p.space[..self.p.row_axes];
        let inner = extents[extents.len() - 1];
        let mut done = 0;
        while done < n {
            let row = self.row + done;
            let len = (inner - row % inner).min(n - done);
            f(done, len, at + offset_of(extents, &access.strides, row));
            done += len;
        }
    }

    #[inline(always)]
    fn address(&self, access: &Access, at: isize) -> *const u8 {
        let base = match access.is_out {
            true => self.memory.outs[access.operand as usize].cast_const(),
            false => self.memory.args[access.operand as usize],
        };
        base.wrapping_offset(at.wrapping_mul(access.elem_bytes as isize))
    }

    #[inline(always)]
    fn read_from(&self, place: Place) -> *const u8 {
        match place {
            Place::Nowhere => std::ptr::null(),
            Place::Scratch(at) => self.scratch.wrapping_add(at),
            Place::Tile(i) => {
                let at = (i as usize).wrapping_mul(self.p.tile_bytes);
                self.scratch.wrapping_add(self.p.tiles_at).wrapping_add(at)
            }
            Place::Kept { at, bytes } => {
                self.scratch.wrapping_add(at).wrapping_add(self.col.wrapping_mul(bytes))
            }
            Place::Memory(access) => {
                self.address(&self.p.accesses[access as usize], self.at[access as usize])
            }
            Place::Next(access) => {
                let a = &self.p.accesses[access as usize];
                let step = match self.p.split {
                    Split::Rows(_) | Split::Columns(_) => {
                        a.row_step(&self.p.space[..self.p.row_axes])
                    }
                    Split::Tiles { .. } => a.step.wrapping_mul(self.p.tile_len as isize),
                };
                self.address(a, self.at[access as usize].wrapping_add(step))
            }
        }
    }

    #[inline(always)]
    fn write_to(&self, place: Place) -> *mut u8 {
        self.read_from(place).cast_mut()
    }
}

/// Writes register `i`.
unsafe fn write(to: *mut u8, i: usize, value: Scalar) {
    // SAFETY: the caller has room for the register.
    unsafe {
        match value.dtype().class() {
            Class::F32 => to.cast::<f32>().add(i).write(value.as_f64() as f32),
            Class::F64 => to.cast::<f64>().add(i).write(value.as_f64()),
            Class::I64 => to.cast::<i64>().add(i).write(value.as_i64()),
        }
    }
}

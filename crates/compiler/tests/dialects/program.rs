//! What a machine runs: buffers, and launches and products on them, in order.

use metal_candle_compiler::Layout;
use metal_candle_compiler::render::Launch;
use metal_candle_graph::DType;

#[derive(Clone, Default)]
pub(crate) struct Program {
    pub(crate) buffers: Vec<Vec<u8>>,
    pub(crate) parts: Vec<Part>,
}

/// A byte of a buffer.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) buffer: usize,
    pub(crate) offset_bytes: usize,
}

impl Address {
    pub(crate) fn further(self, bytes: usize) -> Address {
        Address { offset_bytes: self.offset_bytes + bytes, ..self }
    }
}

impl Program {
    /// Its launches as one of `kernel`, whose operands are theirs.
    pub(crate) fn joined(self, kernel: &str, launch: Launch) -> Program {
        let (mut every_region, mut every_operand): (Vec<Region>, Vec<_>) = Default::default();
        for part in self.parts {
            let Part::Launch { regions, operands, .. } = part else { panic!("a product") };
            every_operand.extend(operands);
            for region in regions {
                match every_region.iter_mut().find(|other| other.start == region.start) {
                    Some(other) => other.writable |= region.writable,
                    None => every_region.push(region),
                }
            }
        }
        let kernel = kernel.to_owned();
        let (regions, operands) = (every_region, every_operand);
        let parts = vec![Part::Launch { kernel, launch, regions, operands }];
        Program { buffers: self.buffers, parts }
    }
}

#[derive(Clone)]
pub(crate) enum Part {
    Launch {
        kernel: String,
        launch: Launch,
        /// All that the kernel may touch.
        regions: Vec<Region>,
        /// Its parameters.
        operands: Vec<Address>,
    },
    Product {
        alpha: f64,
        accumulate: bool,
        has_bias: bool,
        /// Both factors, the bias if there is one, then the result.
        places: Vec<(Address, DType, Layout)>,
    },
}

#[derive(Clone)]
pub(crate) struct Region {
    pub(crate) start: Address,
    pub(crate) len_bytes: usize,
    pub(crate) element_bytes: usize,
    pub(crate) writable: bool,
}

/// As `machine/program.cpp` reads it.
pub(crate) fn encode(programs: &[Program]) -> Vec<u8> {
    let mut out = Vec::new();
    number(&mut out, programs.len());
    for program in programs {
        number(&mut out, program.buffers.len());
        for buffer in &program.buffers {
            number(&mut out, buffer.len());
            out.extend(buffer);
        }
        number(&mut out, program.parts.len());
        program.parts.iter().for_each(|part| encode_part(&mut out, part));
    }
    out
}

fn encode_part(out: &mut Vec<u8>, part: &Part) {
    match part {
        Part::Launch { kernel, launch, regions, operands } => {
            number(out, 0);
            number(out, kernel.len());
            out.extend(kernel.as_bytes());
            for n in [launch.grid, launch.block, launch.shared_bytes, regions.len()] {
                number(out, n);
            }
            for region in regions {
                address(out, region.start);
                for n in [region.len_bytes, region.element_bytes, usize::from(region.writable)] {
                    number(out, n);
                }
            }
            number(out, operands.len());
            operands.iter().for_each(|operand| address(out, *operand));
        }
        Part::Product { alpha, accumulate, has_bias, places } => {
            number(out, 1);
            out.extend(alpha.to_le_bytes());
            number(out, usize::from(*accumulate));
            number(out, usize::from(*has_bias));
            for (at, dtype, layout) in places.iter() {
                address(out, *at);
                let floats = [DType::BF16, DType::F16, DType::F32, DType::F64];
                number(out, floats.iter().position(|float| float == dtype).expect("a float"));
                number(out, layout.shape.rank());
                layout.shape.dims().iter().for_each(|dim| number(out, *dim));
                let signed = layout.strides().iter().chain([&layout.offset]);
                signed.for_each(|n| out.extend((*n as i64).to_le_bytes()));
            }
        }
    }
}

fn number(out: &mut Vec<u8>, n: usize) {
    out.extend((n as u64).to_le_bytes());
}

fn address(out: &mut Vec<u8>, at: Address) {
    number(out, at.buffer);
    number(out, at.offset_bytes);
}

/// By program: its buffers afterwards, or what it did wrong.
pub(crate) fn decode(programs: &[Program], mut bytes: &[u8]) -> Vec<Result<Vec<Vec<u8>>, String>> {
    let mut take = |n: usize| {
        let (head, tail) = bytes.split_at(n);
        bytes = tail;
        head.to_vec()
    };
    let mut result = |program: &Program| {
        let length = u64::from_le_bytes(take(8).try_into().unwrap());
        let fault = String::from_utf8(take(length as usize)).unwrap();
        let buffers = program.buffers.iter().map(|buffer| take(buffer.len())).collect();
        if fault.is_empty() { Ok(buffers) } else { Err(fault) }
    };
    programs.iter().map(&mut result).collect()
}

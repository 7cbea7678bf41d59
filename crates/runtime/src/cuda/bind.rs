//! Where a run's memory lies.

use super::executable::{CudaExecutable, RunMemory};
use super::gpu::Said;
use super::memory::{Allocation, Pinned, Resident};
use super::staging::join;
use crate::buffer::{Buffer, DeviceMemory, Memory};
use crate::candle::Shared;
use crate::{Error, Result};
use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::{Storage, StorageRef};
use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{DevicePtr, result};
use metal_candle_compiler::{OutputSource, Plan};
use std::any::Any;
use std::ops::Range;

/// What a run holds until it is over.
#[derive(Default)]
pub(super) struct Held<'a> {
    /// Keep Candle from writing.
    guards: Vec<StorageRef<'a>>,
    copies: Vec<Allocation>,
    /// The parts of the staging memory that the host has filled.
    pub(super) staged: Vec<Range<usize>>,
}

impl CudaExecutable {
    /// Where this run's memory starts.
    pub(super) fn bind<'a>(
        &self,
        plan: &Plan,
        memory: &RunMemory,
        host: &mut Pinned,
        (inputs, outputs): (&'a [Buffer], &[Option<Allocation>]),
        held: &mut Held<'a>,
    ) -> Result<Vec<CUdeviceptr>> {
        let staging = memory.staging.address();
        let at = |offset: usize| staging + offset as u64;
        let (arena, scratch) = (memory.arena.address(), memory.scratch.address());
        let mut bases = vec![arena, scratch, at(self.staging.status)];
        for (i, buffer) in inputs.iter().enumerate() {
            bases.push(match buffer.memory() {
                _ if !self.used[i] => 0,
                Memory::Device(device) => {
                    let resident = resident(device.as_ref());
                    let slot = self.staging.inputs[i].filter(|_| !plan.inputs[i].donated);
                    match slot.and_then(|slot| Some((slot, resident.staged()?))) {
                        Some((slot, bytes)) => {
                            let range = slot..slot + bytes.len();
                            host.bytes_mut()[range.clone()].copy_from_slice(bytes);
                            join(&mut held.staged, range);
                            at(slot)
                        }
                        None => resident.address()?,
                    }
                }
                Memory::Shared(shared) => self.bind_candle(plan, i, shared, held)?,
                Memory::Owned(_) | Memory::Mapped(_) => {
                    panic!("metal-candle bug: input {i} is on the host")
                }
            });
        }
        for (i, output) in plan.outputs.iter().enumerate() {
            bases.push(match (&output.source, self.staging.outputs[i], &outputs[i]) {
                (OutputSource::Written, Some(slot), _) => at(slot),
                (OutputSource::Written, None, Some(allocation)) => allocation.address(),
                _ => 0,
            });
        }
        Ok(bases)
    }

    fn bind_candle<'a>(
        &self,
        plan: &Plan,
        index: usize,
        shared: &'a Shared,
        held: &mut Held<'a>,
    ) -> Result<CUdeviceptr> {
        let (expected, got) = (plan.inputs[index].ty, shared.dtype());
        let guard = shared.lock();
        // Candle may have put another storage there since.
        let changed = || Error::InputType { index, expected, got, len: 0 };
        let storage = self.candle_address(&guard).ok_or_else(changed)?;
        held.guards.push(guard);
        let address = storage + (shared.start() * got.size_bytes()) as u64;
        self.aligned(address, expected.size_bytes(), &mut held.copies)
    }

    /// Where a Candle tensor's storage starts.
    fn candle_address(&self, storage: &Storage) -> Option<CUdeviceptr> {
        let Storage::Cuda(storage) = storage else { return None };
        let stream = self.gpu.stream();
        // The guard makes our stream wait for whoever wrote it on another.
        Some(match &storage.slice {
            CudaStorageSlice::U8(slice) => slice.device_ptr(stream).0,
            CudaStorageSlice::U32(slice) => slice.device_ptr(stream).0,
            CudaStorageSlice::I64(slice) => slice.device_ptr(stream).0,
            CudaStorageSlice::BF16(slice) => slice.device_ptr(stream).0,
            CudaStorageSlice::F16(slice) => slice.device_ptr(stream).0,
            CudaStorageSlice::F32(slice) => slice.device_ptr(stream).0,
            CudaStorageSlice::F64(slice) => slice.device_ptr(stream).0,
            _ => return None,
        })
    }

    /// A tensor that starts in the middle of a wide access is copied first.
    fn aligned(
        &self,
        address: CUdeviceptr,
        len: usize,
        held: &mut Vec<Allocation>,
    ) -> Result<CUdeviceptr> {
        if address.is_multiple_of(16) {
            return Ok(address);
        }
        let copy = self.gpu.allocate(len, "an aligned copy")?;
        let to = copy.address();
        held.push(copy);
        // SAFETY: both have `len` bytes.
        unsafe { result::memcpy_dtod_async(to, address, len, self.gpu.raw_stream()) }
            .said(|| "aligning an input".into())?;
        Ok(to)
    }
}

fn resident(memory: &dyn DeviceMemory) -> &Resident {
    let any: &dyn Any = memory;
    any.downcast_ref().expect("metal-candle bug: memory of another backend")
}

pub(super) fn resident_mut(memory: &mut dyn DeviceMemory) -> &mut Resident {
    let any: &mut dyn Any = memory;
    any.downcast_mut().expect("metal-candle bug: memory of another backend")
}

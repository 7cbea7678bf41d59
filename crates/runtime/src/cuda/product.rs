//! Matrix products by cuBLASLt.

use super::gpu::Said;
use crate::blas::{Blas, Matrix};
use crate::device::tf32_is_allowed;
use crate::{Error, Result};
use cudarc::cublaslt::{result as lt, sys};
use cudarc::driver::sys::{CUdeviceptr, CUstream};
use cudarc::driver::{CudaStream, result as driver};
use metal_candle_compiler::render;
use metal_candle_graph::DType;
use rustc_hash::FxHashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What NVIDIA recommends for Hopper ("cuBLAS", section on workspaces); older devices need less.
pub(super) const WORKSPACE_BYTES: usize = 32 << 20;

/// The library on a device, with the scratch memory that its products share: they run one after the other.
pub(super) struct Library {
    handle: sys::cublasLtHandle_t,
    workspace: CUdeviceptr,
    /// Held while a product, or a recorded plan, is enqueued: a product's kernels hand each other what lies in the
    /// workspace, and those of another thread must not come between.
    enqueueing: Mutex<()>,
    known: Mutex<FxHashMap<Shape, Arc<Plan>>>,
}

// SAFETY: the library may be called from any thread with one handle ("cuBLASLt", thread safety).
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

/// All that the library wants to know before it chooses a kernel.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    factors: DType,
    out: DType,
    mnk: [usize; 3],
    matrices: [Matrix; 3],
    batch: usize,
    accumulate: bool,
    /// What its address is a multiple of, in bytes, if there is one.
    bias: Option<u32>,
    /// Whether f32 factors may be rounded to TF32.
    tf32: bool,
    /// What the addresses are multiples of, in bytes.
    aligned: [u32; 3],
}

/// The library's descriptors and its choice for a shape. Where a bias is, `operation` is told before each product.
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algorithm: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: once they are made, the descriptors are read, and written, by the thread that enqueues: there is one at a time.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

/// A product that is ready to be enqueued.
pub(super) struct Product {
    plan: Arc<Plan>,
    swapped: bool,
    /// Bytes from the addresses of a, b and the result.
    starts: Vec<[isize; 3]>,
    /// Bytes from the bias's address, if there is one.
    bias: Option<isize>,
    alpha: f64,
    accumulate: bool,
    f64: bool,
}

impl Library {
    pub(super) fn new(stream: &CudaStream) -> Result<Library> {
        let handle = lt::create_handle().said(|| "starting cuBLASLt".into())?;
        // SAFETY: never freed, as the device is never let go.
        let workspace = unsafe { driver::malloc_async(stream.cu_stream(), WORKSPACE_BYTES) }
            .said(|| "allocating cuBLASLt's workspace".into())?;
        Ok(Library { handle, workspace, enqueueing: Mutex::default(), known: Mutex::default() })
    }

    /// The product, if the library takes its operands.
    ///
    /// # Errors
    /// What the library says, other than that it does not support such a product.
    pub(super) fn product(&self, product: &render::Product) -> Result<Option<Product>> {
        let render::Product { alpha, accumulate, a, b, bias, out } = product;
        let (alpha, accumulate) = (*alpha, *accumulate);
        let Some(blas) = Blas::new(&a.layout, &b.layout, &out.layout) else { return Ok(None) };
        if data_type(a.dtype).is_none() || data_type(out.dtype).is_none() || a.dtype != b.dtype {
            return Ok(None);
        }
        // The library adds a vector to every column of what it calls the result: a row of ours, unless that is transposed.
        if bias.as_ref().is_some_and(|bias| blas.swapped || bias.dtype != out.dtype) {
            return Ok(None);
        }
        let sizes = [a, b, out].map(|place| place.dtype.size_bytes() as isize);
        let starts: Vec<[isize; 3]> =
            blas.outer.iter().map(|s| [0, 1, 2].map(|i| s[i] * sizes[i])).collect();
        let [first, second] = if blas.swapped { [1, 0] } else { [0, 1] };
        let strides = [blas.a, blas.b, blas.out].map(|m| m.batch_stride);
        let multiple = |bytes: isize| 1 << bytes.trailing_zeros().min(8);
        let aligned = |i: usize, matrix: usize| {
            let stride = strides[matrix] * sizes[i];
            multiple(starts.iter().fold(stride, |all, s| all | s[i]))
        };
        let bias = bias.as_ref().map(|bias| bias.layout.offset * sizes[2]);
        let shape = Shape {
            factors: a.dtype,
            out: out.dtype,
            mnk: [blas.m, blas.n, blas.k],
            matrices: [blas.a, blas.b, blas.out],
            batch: blas.batch,
            accumulate,
            bias: bias.map(multiple),
            tf32: a.dtype == DType::F32 && tf32_is_allowed(),
            aligned: [aligned(first, 0), aligned(second, 1), aligned(2, 2)],
        };
        let Some(plan) = self.plan(&shape)? else { return Ok(None) };
        let (swapped, f64) = (blas.swapped, a.dtype == DType::F64);
        Ok(Some(Product { plan, swapped, starts, bias, alpha, accumulate, f64 }))
    }

    fn plan(&self, shape: &Shape) -> Result<Option<Arc<Plan>>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = known.get(shape) {
            return Ok(Some(Arc::clone(plan)));
        }
        match Plan::new(self.handle, shape, self.workspace) {
            Ok(plan) => {
                let plan = Arc::new(plan);
                known.insert(*shape, Arc::clone(&plan));
                Ok(Some(plan))
            }
            Err(lt::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)) => Ok(None),
            Err(error) => Err(error).said(|| format!("planning a product of {:?}", shape.mnk)),
        }
    }

    /// While this is held, nobody else's product comes into the stream.
    pub(super) fn alone(&self) -> MutexGuard<'_, ()> {
        self.enqueueing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks for the product of what lies at the addresses of a, b, the bias if there is one, and the result.
    ///
    /// # Safety
    /// The operands that the product was made for lie there, and stay until the stream is through.
    pub(super) unsafe fn enqueue(
        &self,
        product: &Product,
        addresses: &[CUdeviceptr],
        stream: CUstream,
    ) -> Result<()> {
        let beta = f64::from(u8::from(product.accumulate));
        let (alpha32, beta32) = (product.alpha as f32, beta as f32);
        let scalar = |double: &f64, single: &f32| -> *const c_void {
            if product.f64 {
                std::ptr::from_ref(double).cast()
            } else {
                std::ptr::from_ref(single).cast()
            }
        };
        let [a_layout, b_layout, out_layout] = product.plan.layouts;
        let last = addresses.len() - 1;
        let _alone = self.alone();
        if let Some(start) = product.bias {
            // SAFETY: a descriptor of this handle, that no other thread looks at meanwhile.
            unsafe {
                bias_is_at(product.plan.operation, addresses[2].wrapping_add_signed(start as i64))
            }
            .said(|| "enqueueing a product".into())?;
        }
        for starts in &product.starts {
            let at = |i: usize| {
                let address = addresses[if i == 2 { last } else { i }];
                address.wrapping_add_signed(starts[i] as i64) as *mut c_void
            };
            let [a, b] = if product.swapped { [at(1), at(0)] } else { [at(0), at(1)] };
            // SAFETY: descriptors of this handle; the caller's promise for the addresses. Column-major, as the
            // library has it, the transposed result is b's transposed by a's.
            unsafe {
                lt::matmul(
                    self.handle,
                    product.plan.operation,
                    scalar(&product.alpha, &alpha32),
                    scalar(&beta, &beta32),
                    b,
                    b_layout,
                    a,
                    a_layout,
                    at(2),
                    out_layout,
                    at(2),
                    out_layout,
                    &raw const product.plan.algorithm,
                    self.workspace as *mut c_void,
                    WORKSPACE_BYTES,
                    stream.cast(),
                )
            }
            .said(|| "enqueueing a product".into())?;
        }
        Ok(())
    }
}

const fn data_type(dtype: DType) -> Option<sys::cudaDataType> {
    match dtype {
        DType::F32 => Some(sys::cudaDataType::CUDA_R_32F),
        DType::F64 => Some(sys::cudaDataType::CUDA_R_64F),
        DType::BF16 => Some(sys::cudaDataType::CUDA_R_16BF),
        DType::F16 => Some(sys::cudaDataType::CUDA_R_16F),
        DType::U8 | DType::U32 | DType::I64 => None,
    }
}

impl Plan {
    /// `memory` is anywhere on the device, at a multiple of 512 bytes.
    fn new(
        handle: sys::cublasLtHandle_t,
        shape: &Shape,
        memory: CUdeviceptr,
    ) -> std::result::Result<Plan, lt::CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Op;
        let unsupported = lt::CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED);
        let factors = data_type(shape.factors).ok_or(unsupported)?;
        let out = data_type(shape.out).ok_or(unsupported)?;
        let (compute, scale) = match shape.factors {
            DType::F64 => {
                (sys::cublasComputeType_t::CUBLAS_COMPUTE_64F, sys::cudaDataType::CUDA_R_64F)
            }
            _ if shape.tf32 => (
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
                sys::cudaDataType::CUDA_R_32F,
            ),
            _ => (sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType::CUDA_R_32F),
        };
        let operation = lt::create_matmul_desc(compute, scale)?;
        let [m, n, k] = shape.mnk;
        let [a, b, result] = shape.matrices;
        let layouts = [
            layout(factors, [m, k], a, shape.batch)?,
            layout(factors, [k, n], b, shape.batch)?,
            layout(out, [m, n], result, shape.batch)?,
        ];
        for (attribute, matrix) in
            [(Op::CUBLASLT_MATMUL_DESC_TRANSA, b), (Op::CUBLASLT_MATMUL_DESC_TRANSB, a)]
        {
            let transposed = i32::from(matrix.transposed);
            // SAFETY: a descriptor that was just made, and a value of the attribute's type.
            unsafe {
                lt::set_matmul_desc_attribute(
                    operation,
                    attribute,
                    (&raw const transposed).cast(),
                    4,
                )?;
            }
        }
        if let Some(aligned) = shape.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            // SAFETY: as above.
            unsafe {
                let attribute = Op::CUBLASLT_MATMUL_DESC_EPILOGUE;
                lt::set_matmul_desc_attribute(
                    operation,
                    attribute,
                    (&raw const epilogue).cast(),
                    size_of_val(&epilogue),
                )?;
                // What is chosen may depend on how the address is aligned.
                bias_is_at(operation, memory + u64::from(aligned))?;
            }
        }
        let algorithm = choose(handle, operation, layouts, shape)?;
        Ok(Plan { operation, layouts, algorithm })
    }
}

/// # Safety
/// A descriptor that lives and that nobody else uses meanwhile.
unsafe fn bias_is_at(
    operation: sys::cublasLtMatmulDesc_t,
    address: CUdeviceptr,
) -> std::result::Result<(), lt::CublasError> {
    let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
    let value = (&raw const address).cast();
    // SAFETY: the caller's promise, and a value of the attribute's type.
    unsafe { lt::set_matmul_desc_attribute(operation, attribute, value, size_of_val(&address)) }
}

/// What the library is told of a matrix with so many rows and columns: row-major rows x cols is its cols x rows.
fn layout(
    dtype: sys::cudaDataType,
    [rows, cols]: [usize; 2],
    matrix: Matrix,
    batch: usize,
) -> std::result::Result<sys::cublasLtMatrixLayout_t, lt::CublasError> {
    use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
    let [rows, cols] = if matrix.transposed { [rows, cols] } else { [cols, rows] };
    let layout = lt::create_matrix_layout(dtype, rows as u64, cols as u64, matrix.leading as i64)?;
    let (batch, stride) = (batch as i32, matrix.batch_stride as i64);
    // SAFETY: a layout that was just made, and values of the attributes' types.
    unsafe {
        let count = Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT;
        lt::set_matrix_layout_attribute(layout, count, (&raw const batch).cast(), 4)?;
        let offset = Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET;
        lt::set_matrix_layout_attribute(layout, offset, (&raw const stride).cast(), 8)?;
    }
    Ok(layout)
}

/// The library's own guess at the fastest kernel.
fn choose(
    handle: sys::cublasLtHandle_t,
    operation: sys::cublasLtMatmulDesc_t,
    [a, b, out]: [sys::cublasLtMatrixLayout_t; 3],
    shape: &Shape,
) -> std::result::Result<sys::cublasLtMatmulAlgo_t, lt::CublasError> {
    use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
    let preference = lt::create_matmul_pref()?;
    let set = |attribute, value: *const c_void, len| {
        // SAFETY: a preference that was just made, and values of the attributes' types.
        unsafe { lt::set_matmul_pref_attribute(preference, attribute, value, len) }
    };
    let chosen = (|| {
        let bytes = WORKSPACE_BYTES;
        let most = Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        set(most, (&raw const bytes).cast(), size_of::<usize>())?;
        let [a_aligned, b_aligned, out_aligned] = shape.aligned;
        for (attribute, aligned) in [
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b_aligned),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a_aligned),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, out_aligned),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, out_aligned),
        ] {
            set(attribute, (&raw const aligned).cast(), 4)?;
        }
        // SAFETY: descriptors that live.
        unsafe { lt::get_matmul_algo_heuristic(handle, operation, b, a, out, out, preference) }
    })();
    // SAFETY: made above, and used no more.
    let _ = unsafe { lt::destroy_matmul_pref(preference) };
    chosen.map(|heuristic| heuristic.algo)
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made in `new`. A failure can be told to nobody.
        unsafe {
            for layout in self.layouts {
                let _ = lt::destroy_matrix_layout(layout);
            }
            let _ = lt::destroy_matmul_desc(self.operation);
        }
    }
}

impl From<lt::CublasError> for Error {
    fn from(error: lt::CublasError) -> Error {
        Error::Cuda { doing: "multiplying".into(), message: error.to_string() }
    }
}

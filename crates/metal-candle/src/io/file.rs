//! Reading whole files, and writing them so that a reader sees the old one or the new one.

use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use super::{Error, Result};

/// The bytes of a file.
///
/// # Errors
/// [`Error::File`].
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(Error::file(path))
}

/// A value from a JSON file.
///
/// # Errors
/// [`Error::File`]; [`Error::Json`] with line and column.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_slice(&read(path)?)
        .map_err(|cause| Error::Json { path: path.to_owned(), cause })
}

/// Writes `bytes` to `path` in one step: a power cut or a kill leaves the old file or the new one.
///
/// The bytes go to a temporary file in the same folder, which is synchronised and then renamed.
///
/// # Errors
/// [`Error::File`]; the temporary file is then removed.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic_with(path, |to| to.write_all(bytes).map_err(Error::file(path)))
}

/// As [`write_atomic`], piece by piece, for what does not fit in memory.
///
/// # Errors
/// Those of `write`, and [`Error::File`]; the temporary file is then removed.
pub fn write_atomic_with<E: From<Error>>(
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let temporary = temporary_name(path);
    let written = write_temporary(&temporary, path, write).and_then(|()| {
        let renamed = fs::rename(&temporary, path).and_then(|()| sync_folder(path));
        renamed.map_err(|cause| Error::file(path)(cause).into())
    });
    if written.is_err() {
        // The first error is the one to report; a leftover would only be a second symptom of it.
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn write_temporary<E: From<Error>>(
    temporary: &Path,
    path: &Path,
    write: impl FnOnce(&mut dyn Write) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let failed = |cause| Error::file(path)(cause);
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(temporary);
    let mut file = BufWriter::with_capacity(1 << 20, file.map_err(failed)?);
    write(&mut file)?;
    let file = file.into_inner().map_err(|e| failed(e.into_error()))?;
    file.sync_all().map_err(failed)?;
    Ok(())
}

/// Makes the folder if it is not there, and sees that files can be made in it.
///
/// # Errors
/// [`Error::File`].
pub fn check_writable(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::file(folder))?;
    let probe = temporary_name(&folder.join("probe"));
    File::create(&probe).and_then(|_| fs::remove_file(&probe)).map_err(Error::file(folder))
}

/// `.{name}.{process}.tmp` beside `path`, so that two processes never share one.
fn temporary_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

/// Makes the rename itself durable. Only Unix lets a folder be opened and synchronised.
fn sync_folder(path: &Path) -> std::io::Result<()> {
    if cfg!(unix)
        && let Some(folder) = path.parent()
    {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

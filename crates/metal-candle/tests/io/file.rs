use std::fs;

use metal_candle::io::{Error, file};

#[test]
fn an_atomic_write_replaces_the_file_and_leaves_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.bin");
    file::write_atomic(&path, b"old").unwrap();
    file::write_atomic(&path, b"new").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"new");
    let names: Vec<_> = fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["weights.bin"]);
}

#[test]
fn a_failed_atomic_write_leaves_the_old_file_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    // A folder in the way: the rename fails after the bytes were written.
    let path = folder.path().join("taken");
    fs::create_dir_all(path.join("inside")).unwrap();
    let error = file::write_atomic(&path, b"new").unwrap_err();
    assert!(matches!(&error, Error::File { path: named, .. } if *named == path), "{error}");
    let names: Vec<_> = fs::read_dir(&folder).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["taken"]);
    assert!(path.join("inside").exists());
}

#[test]
fn a_missing_folder_is_an_error_with_the_path() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("no/such/file");
    assert!(file::write_atomic(&path, b"x").unwrap_err().to_string().contains("no/such/file"));
    assert!(file::read(&path).unwrap_err().to_string().contains("no/such/file"));
}

#[test]
fn bad_json_is_an_error_with_line_and_column() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.json");
    fs::write(&path, "{\n  \"a\": nope\n}").unwrap();
    let error = file::read_json::<serde_json::Value>(&path).unwrap_err().to_string();
    assert!(error.contains("line 2 column 9"), "{error}");
}

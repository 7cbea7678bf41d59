//! Rows of JSON, one object a line.

use super::columns::{Fields, Wanted};
use super::{Content, RowProblem};
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use serde_json::Value;

/// One line, or `None` for a blank one. Errors come with their column.
pub(super) fn parse(
    bytes: &[u8],
    wanted: &Wanted<'_>,
) -> Result<Option<Content>, (usize, RowProblem)> {
    let text = str::from_utf8(bytes).map_err(|e| (e.valid_up_to() + 1, RowProblem::Utf8))?;
    let text = text.trim_end_matches(['\n', '\r']);
    // Some editors begin a file with a byte order mark.
    let (skipped, text) = match text.strip_prefix('\u{feff}') {
        Some(rest) => (text.len() - rest.len(), rest),
        None => (0, text),
    };
    if text.trim().is_empty() {
        return Ok(None);
    }
    // Its own column for a value of another kind is that of the value's end.
    if !text.trim_start().starts_with('{') {
        let cause = "expected an object".to_owned();
        return Err((skipped + 1, RowProblem::Json { cause }));
    }
    let mut json = serde_json::Deserializer::from_str(text);
    let fields = wanted.deserialize(&mut json).and_then(|fields| json.end().map(|()| fields));
    let fields = fields.map_err(|cause| {
        let message = cause.to_string();
        // The position is the error's own; serde_json's counts lines within the row.
        let cause_only = message.rsplit_once(" at line ").map_or(&*message, |(what, _)| what);
        (skipped + cause.column().max(1), RowProblem::Json { cause: cause_only.to_owned() })
    })?;
    let keys = || {
        let row: serde_json::Map<String, Value> = serde_json::from_str(text).unwrap_or_default();
        row.keys().cloned().collect()
    };
    wanted.content(fields, keys).map(Some).map_err(|problem| (1, problem))
}

impl<'de, 'a> DeserializeSeed<'de> for &Wanted<'a> {
    type Value = Fields<'a>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Fields<'a>, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de, 'a> Visitor<'de> for &Wanted<'a> {
    type Value = Fields<'a>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'a>, A::Error> {
        let mut fields = Fields::default();
        let mut seen: Vec<String> = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            let is_chat = self.chat == Some(&*key);
            let is_tools = self.chat.is_some() && key == "tools";
            let string = self.string(&key);
            if !is_chat && !is_tools && string.is_none() {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            if seen.contains(&key) {
                return Err(A::Error::custom(format_args!("duplicate key {key:?}")));
            }
            match string {
                _ if is_chat => fields.messages = map.next_value()?,
                Some(name) => {
                    let value: Option<String> = map.next_value()?;
                    fields.strings.extend(value.map(|value| (name, value)));
                }
                None => fields.tools = map.next_value()?,
            }
            seen.push(key);
        }
        Ok(fields)
    }
}

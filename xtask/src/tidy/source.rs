//! Just enough of Rust's syntax to look at code without its comments and strings, and at `match`.

/// What to keep of a source text.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    /// Neither comments nor the contents of strings and characters.
    Code,
    /// No comments.
    CodeAndStrings,
}

/// `text` with all else blanked out: every character that is left stands where it stood.
pub(super) fn strip(text: &str, keep: Keep) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let (len, kept) = match token(rest, out.chars().next_back()) {
            Token::Comment(len) => (len, false),
            Token::Literal(len) => (len, keep == Keep::CodeAndStrings),
            Token::Other => (next.len_utf8(), true),
        };
        let (token, after) = rest.split_at(len);
        if kept {
            out.push_str(token);
        } else {
            out.extend(token.chars().map(|c| if c == '\n' { c } else { ' ' }));
        }
        rest = after;
    }
    out
}

/// What `rest` begins with, and its length in bytes.
enum Token {
    Comment(usize),
    Literal(usize),
    Other,
}

fn token(rest: &str, before: Option<char>) -> Token {
    if rest.starts_with("//") {
        return Token::Comment(rest.find('\n').unwrap_or(rest.len()));
    }
    if rest.starts_with("/*") {
        return Token::Comment(block_comment(rest));
    }
    if rest.starts_with('"') {
        return Token::Literal(quoted(rest, '"'));
    }
    if rest.starts_with('\'') {
        return character(rest).map_or(Token::Other, Token::Literal);
    }
    let begins_word = !before.is_some_and(is_word);
    if begins_word && let Some(len) = raw_string(rest) {
        return Token::Literal(len);
    }
    Token::Other
}

pub(super) fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Block comments nest.
fn block_comment(rest: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < rest.len() {
        if rest[at..].starts_with("/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if rest[at..].starts_with("*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += rest[at..].chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

/// From quote to quote, with escapes.
fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in rest.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// A character literal; `None` for a lifetime.
fn character(rest: &str) -> Option<usize> {
    let mut chars = rest.char_indices().skip(1);
    match chars.next()?.1 {
        '\\' => Some(quoted(rest, '\'')),
        _ => chars.next().filter(|(_, c)| *c == '\'').map(|(at, _)| at + 1),
    }
}

/// `r"..."`, `br#"..."#` and so on.
fn raw_string(rest: &str) -> Option<usize> {
    let after = rest.strip_prefix("br").or_else(|| rest.strip_prefix('r'))?;
    let inner = after.trim_start_matches('#');
    let hashes = after.len() - inner.len();
    let body = inner.strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let start = rest.len() - body.len();
    Some(body.find(&end).map_or(rest.len(), |at| start + at + end.len()))
}

/// Where `word` stands as a word of its own in `code`, in bytes.
pub(super) fn words<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(word).map(|(at, _)| at).filter(move |&at| {
        let before = code[..at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        !before.is_some_and(is_word) && !after.is_some_and(is_word)
    })
}

/// The line of a byte, from 1.
pub(super) fn line_of(text: &str, at: usize) -> usize {
    text[..at].matches('\n').count() + 1
}

/// One `match`: where it stands, and the patterns of its arms.
pub(super) struct Match<'a> {
    pub(super) at: usize,
    pub(super) patterns: Vec<&'a str>,
}

/// Every `match` of a text that was stripped to [`Keep::Code`].
pub(super) fn matches(code: &str) -> Vec<Match<'_>> {
    let parse = |at: usize| {
        let open = at + until(&code[at..], &['{'])?;
        let body = &code[open + 1..open + closing(&code[open..])?];
        Some(Match { at, patterns: patterns(body) })
    };
    words(code, "match").filter_map(parse).collect()
}

/// The patterns of a match's arms, without their guards.
fn patterns(mut body: &str) -> Vec<&str> {
    let mut patterns = Vec::new();
    while let Some(arrow) = arrow(body) {
        let pattern = &body[..arrow];
        let guard = words(pattern, "if").next();
        // A guarded arm catches nothing for sure.
        if guard.is_none() {
            patterns.push(pattern.trim());
        }
        let arm = body[arrow + 2..].trim_start();
        body = match arm.strip_prefix('{').and_then(|_| closing(arm)) {
            Some(end) => arm[end + 1..].trim_start().trim_start_matches(','),
            None => until(arm, &[',']).map_or("", |comma| &arm[comma + 1..]),
        };
    }
    patterns
}

/// The first `=>` outside of brackets.
fn arrow(text: &str) -> Option<usize> {
    let mut from = 0;
    loop {
        let at = from + until(&text[from..], &['='])?;
        if text[at..].starts_with("=>") {
            return Some(at);
        }
        from = at + 1;
    }
}

/// The first of `stops` outside of brackets.
fn until(text: &str, stops: &[char]) -> Option<usize> {
    let mut depth = 0i32;
    for (at, c) in text.char_indices() {
        if depth == 0 && stops.contains(&c) {
            return Some(at);
        }
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// The bracket that closes the one that `text` begins with.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0i32;
    for (at, c) in text.char_indices() {
        match c {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::{Keep, matches, strip, words};

    #[test]
    fn comments_and_strings_are_blanked_in_place() {
        let text = "a // x\n\"b\\\"c\" /* d /* e */ */ r#\"f\"#; 'g' '\\'' &'h str";
        let code = strip(text, Keep::Code);
        assert_eq!(code.len(), text.len());
        let left: Vec<&str> = code.split_whitespace().collect();
        assert_eq!(left, ["a", ";", "&'h", "str"]);
        assert!(strip(text, Keep::CodeAndStrings).contains("\"b\\\"c\""));
        assert!(!strip(text, Keep::CodeAndStrings).contains('x'));
    }

    #[test]
    fn words_are_whole() {
        assert_eq!(words("unsafe_code; unsafe {", "unsafe").collect::<Vec<_>>(), [13]);
    }

    #[test]
    fn arms_are_found_through_blocks_guards_and_nested_matches() {
        let code = "match f(x, |y| { y }) { A(a) | B { a } => g(a, 1), C if d => {} D => { match e { _ => 1 } }, f => 2 }";
        let found: Vec<Vec<&str>> = matches(code).into_iter().map(|m| m.patterns).collect();
        assert_eq!(found, [vec!["A(a) | B { a }", "D", "f"], vec!["_"]]);
    }
}

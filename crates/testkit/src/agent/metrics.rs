//! Prometheus text as a map.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

/// Samples by name and labels.
#[derive(Debug, Clone, Default)]
pub struct Metrics {
    samples: BTreeMap<String, f64>,
    families: BTreeMap<String, String>,
}

impl Metrics {
    /// Reads the exposition format; timestamps and exemplars are left out.
    pub fn parse(text: &str) -> Result<Self> {
        let mut samples = BTreeMap::new();
        let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
        let families = types.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect();
        for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            // Values of labels may hold blanks, so a name with labels ends at its last brace.
            let labelled = line.find('{').and_then(|open| line[open..].find("} ").map(|close| open + close + 1));
            let end = labelled.or_else(|| line.find(' ')).with_context(|| format!("no value in metric line {line}"))?;
            let (name, rest) = line.split_at(end);
            let value = rest.split_ascii_whitespace().next().unwrap_or_default();
            let value = value.parse().with_context(|| format!("no number in metric line {line}"))?;
            samples.insert(name.to_owned(), value);
        }
        Ok(Self { samples, families })
    }

    /// All families, by their name without suffixes, with their type.
    pub fn families(&self) -> &BTreeMap<String, String> {
        &self.families
    }

    /// The family a sample of [`Self::samples`] belongs to.
    pub fn family_of<'a>(&'a self, sample: &str) -> Option<(&'a str, &'a str)> {
        let name = sample.split('{').next().unwrap_or_default();
        let bare = ["", "_total", "_bucket", "_sum", "_count", "_info"]
            .into_iter()
            .find_map(|suffix| self.families.get_key_value(name.strip_suffix(suffix)?));
        bare.map(|(family, kind)| (family.as_str(), kind.as_str()))
    }

    /// All samples, as `name{label="value",...}`.
    pub fn samples(&self) -> &BTreeMap<String, f64> {
        &self.samples
    }

    /// Sum over all labels of a metric; none when it is not exported.
    pub fn total(&self, name: &str) -> Option<f64> {
        self.total_where(name, &[])
    }

    /// Sum over the samples of a metric that have these labels; none when there are none.
    pub fn total_where(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let matching = self.samples.iter().filter(|(sample, _)| {
            let (its_name, its_labels) = sample.split_once('{').unwrap_or((sample, ""));
            its_name == name && labels.iter().all(|(key, value)| has_label(its_labels, key, value))
        });
        matching.map(|(_, value)| *value).reduce(|sum, value| sum + value)
    }
}

/// `labels` is what follows the opening brace.
fn has_label(labels: &str, key: &str, value: &str) -> bool {
    let wanted = format!("{key}=\"{value}\"");
    labels.match_indices(&wanted).any(|(at, _)| at == 0 || labels[..at].ends_with(','))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# HELP farshore_changes Changes.
# TYPE farshore_changes counter
farshore_changes_total{stream=\"north\",op=\"insert\"} 3
farshore_changes_total{stream=\"north\",op=\"delete\"} 4 1763669100000
farshore_changes_total{stream=\"so uth\",op=\"insert\"} 5
farshore_lag_seconds 0.25
# EOF
";

    #[test]
    fn samples_are_summed_by_labels() {
        let metrics = Metrics::parse(TEXT).expect("well formed");
        assert_eq!(metrics.samples().len(), 4);
        assert_eq!(metrics.total("farshore_lag_seconds"), Some(0.25));
        assert_eq!(metrics.total("farshore_changes_total"), Some(12.0));
        assert_eq!(metrics.total_where("farshore_changes_total", &[("op", "insert")]), Some(8.0));
        assert_eq!(metrics.total_where("farshore_changes_total", &[("stream", "so uth")]), Some(5.0));
        assert_eq!(metrics.total_where("farshore_changes_total", &[("op", "none")]), None);
        assert_eq!(metrics.total("farshore_changes"), None);
        assert_eq!(metrics.families().len(), 1);
        let family = metrics.family_of("farshore_changes_total{stream=\"north\",op=\"insert\"}");
        assert_eq!(family, Some(("farshore_changes", "counter")));
        assert_eq!(metrics.family_of("farshore_lag_seconds"), None);
    }

    #[test]
    fn a_line_without_a_number_is_an_error() {
        assert!(Metrics::parse("farshore_lag_seconds").is_err());
        assert!(Metrics::parse("farshore_lag_seconds much").is_err());
    }
}

pub(crate) fn run(
    _: &std::path::Path,
    _: Option<(&std::path::Path, &std::path::Path)>,
) -> anyhow::Result<()> {
    Ok(())
}

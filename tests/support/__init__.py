"""What tests share: how results are judged, layers and models to try, suites of several stages."""

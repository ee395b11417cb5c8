"""One pure function: config + model + hardware -> Plan. No torch."""
